// The native dispatcher: a call of torch.ops.autofuse.<op>, from PyTorch's dispatcher to the kernel's launch without Python.
//
// It knows nothing of any op. Python hands it, for each plan and problem, a binding (autofuse/ops/binding.py) and the
// loaded kernels; whatever call matches one of these is launched here, and any other goes to the op's Python
// implementation, registered as autofuse::_unbound_<op>, which binds it for the next time or runs the reference.
//
// Only PyTorch's stable C ABI is used (torch/csrc/stable/c/shim.h), c10's ValueError, and the CUDA driver by function pointers
// that Python looks up: the library needs neither CUDA nor more of PyTorch's C++ headers, and compiles in a second or two.

#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr int MAX_DIMS = 6;
constexpr int MAX_OPS = 16;
constexpr int MAX_ARGS = 32;
constexpr int MAX_PARAMS_BYTES = 512;
constexpr int MAX_FIELDS = 64;
constexpr int HIDDEN_ARGUMENTS = 4;  // null pointers after a Triton kernel's arguments: autofuse/targets/base.py

// ---- What Python hands over: mirrored in autofuse/runtime/native.py --------------------------------------------------

struct TensorGuard {
    int32_t arg;
    int32_t dtype;
    int32_t element_bytes;
    int32_t dims;  // -1: any, for one element in all
    int32_t align;  // bytes; 0: the variant's
    int32_t padding;
    int64_t sizes[MAX_DIMS];  // -1: T; -2: any but 0; -3: T or more
};
struct Constant {
    int32_t arg;
    int32_t is_bool;
    int64_t value;
};
struct Field {
    int32_t kind;  // FieldKind
    int32_t index;
    int32_t dim;
    int32_t offset;  // bytes into the parameter struct
};
struct Result {
    int32_t dtype;
    int32_t dims;
    int64_t sizes[MAX_DIMS];  // -1: T
    int64_t round_tokens;     // T in sizes is rounded up to a multiple of it
    int64_t column_major;     // 0: contiguous; else 2-D, strides (1, the first size rounded up to a multiple of it)
};
struct Variant {  // one bucket of the plan
    int64_t up_to_tokens;
    uint64_t function;  // CPU: void (*)(const void*); CUDA: CUfunction; 0: the reference runs
    int64_t units_per_token;
    int64_t units_per_block;
    int64_t repeat;
    int64_t more_per_token;  // units of further blocks
    int64_t more_per_block;
    uint64_t align;
    uint32_t block;
    uint32_t shared_bytes;
    int32_t programmatic;
    int32_t separate_arguments;  // each field is an argument of its own, as Triton has it; 0: they are one struct
};

struct Bound {  // of the values of an int64 argument, which are rows of another one
    int32_t arg;
    int32_t rows_of;
    int32_t dims;    // of that one, the leading ones, count rows
    int32_t padded;  // negative values are none
};

enum FieldKind { POINTER, RESULT, STRIDE, TOKENS, FLOAT, SIZE, NOTHING, FLAG };

struct Entry {
    std::string plan;
    int32_t device_type, device_index;
    bool on_gpu;
    void* context;  // CUcontext the functions belong to
    std::vector<TensorGuard> tensors;
    std::vector<Constant> constants;
    std::vector<Field> fields;
    std::vector<Result> results;
    std::vector<Variant> variants;  // ascending up_to_tokens; the last one takes the rest
    std::vector<Bound> bounds;
};

// Plan → entries, the newest first. The keys point into the entries, which live for ever.
typedef std::unordered_map<std::string_view, std::vector<const Entry*>> Entries;

struct Op {
    std::string unbound;     // autofuse::_unbound_<op>, which takes all arguments but the plan
    std::string arg_types;   // T tensor, O tensor or None, f float, i int, b bool, s string; the last one is the plan
    // Replaced as a whole, and never freed: a call in another thread may be reading it.
    std::atomic<const Entries*> entries{nullptr};
};

Op ops[MAX_OPS];
std::mutex binding;  // one binder at a time; callers take no lock
thread_local std::string python_error;
thread_local bool python_error_is_value_error = false;
thread_local const char* current_plan = "";

// ---- CUDA driver ------------------------------------------------------------------------------------------------------

struct LaunchAttribute {
    int id, padding, value;
    char rest[60];
};
struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void* stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};
struct Cuda {
    int (*launch)(const LaunchConfig*, void*, void**, void**);
    int (*get_context)(void**);
    int (*push_context)(void*);
    int (*pop_context)(void**);
    int (*error_string)(int, const char**);
    AOTITorchError (*current_stream)(int32_t, void**);
} cuda;

constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;

// The addresses of the kernel's arguments.
void point_at(const Entry& entry, const Variant& variant, char* params, void** pointers) {
    static void* nothing = nullptr;
    if (!variant.separate_arguments) {
        *pointers = params;
        return;
    }
    for (const Field& field : entry.fields) *pointers++ = params + field.offset;
    for (int i = 0; i < HIDDEN_ARGUMENTS; ++i) *pointers++ = &nothing;
}

void launch_cuda(const Entry& entry, const Variant& variant, int64_t blocks, char* params) {
    LaunchAttribute attribute{PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1, {}};
    LaunchConfig config{};
    config.grid_x = unsigned(blocks);
    config.grid_y = config.grid_z = config.block_y = config.block_z = 1;
    config.block_x = variant.block;
    config.shared_bytes = variant.shared_bytes;
    config.attributes = &attribute;
    config.attribute_count = variant.programmatic ? 1 : 0;
    if (cuda.current_stream(entry.device_index, &config.stream)) throw std::runtime_error("no current CUDA stream");
    void* pointers[MAX_FIELDS + HIDDEN_ARGUMENTS];
    point_at(entry, variant, params, pointers);
    void* context = nullptr;
    cuda.get_context(&context);
    const bool elsewhere = context != entry.context;
    if (elsewhere) cuda.push_context(entry.context);
    const int error = cuda.launch(&config, reinterpret_cast<void*>(variant.function), pointers, nullptr);
    if (elsewhere) cuda.pop_context(&context);
    if (error) {
        const char* text = nullptr;
        cuda.error_string(error, &text);
        throw std::runtime_error(std::string("autofuse: launching a kernel: ") + (text ? text : "unknown CUDA error"));
    }
}

// ---- Calls ------------------------------------------------------------------------------------------------------------

template <typename T>
T as(StableIValue value) {
    T result;
    memcpy(&result, &value, sizeof result);
    return result;
}

int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Tensor {
    void* data;
    const int64_t *sizes, *strides;
};

bool look_at(AtenTensorHandle handle, const TensorGuard& guard, const Entry& entry, Tensor& tensor, int64_t& tokens) {
    int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
    int32_t dtype = 0, device_type = 0, device_index = 0;
    aoti_torch_get_dim(handle, &dims);
    aoti_torch_get_dtype(handle, &dtype);
    aoti_torch_get_device_type(handle, &device_type);
    aoti_torch_get_device_index(handle, &device_index);
    if ((guard.dims >= 0 && dims != guard.dims) || dtype != guard.dtype || device_type != entry.device_type ||
        (entry.on_gpu && device_index != entry.device_index))
        return false;
    aoti_torch_get_sizes(handle, &sizes);
    aoti_torch_get_strides(handle, &strides);
    aoti_torch_get_data_ptr(handle, &tensor.data);
    for (int d = 0; d < dims; ++d) {
        if (guard.dims < 0) {
            if (sizes[d] != 1) return false;
        } else if (guard.sizes[d] >= 0) {
            if (sizes[d] != guard.sizes[d]) return false;
        } else if (guard.sizes[d] == -2) {
            if (sizes[d] == 0) return false;
        } else if (guard.sizes[d] == -3) {
            if (sizes[d] < tokens) return false;
        } else if (tokens < 0) {
            tokens = sizes[d];
        } else if (sizes[d] != tokens) {
            return false;
        }
    }
    tensor.sizes = sizes;
    tensor.strides = strides;
    return dims == 0 || sizes[dims - 1] <= 1 || strides[dims - 1] == 1;
}

bool aligned(const Tensor& tensor, const TensorGuard& guard, uint64_t align) {
    if (guard.align) align = uint64_t(guard.align);
    if (reinterpret_cast<uint64_t>(tensor.data) % align) return false;
    for (int d = 0; d + 1 < guard.dims; ++d)
        if (tensor.sizes[d] > 1 && uint64_t(tensor.strides[d] * guard.element_bytes) % align) return false;
    return true;
}

// Whether the values of the first `tokens` elements are rows that there are. On the CPU: on a GPU they would have to be waited
// for.
bool in_bounds(const Bound& bound, const Tensor* tensors, int64_t tokens) {
    const Tensor& indices = tensors[bound.arg];
    const auto* const values = static_cast<const int64_t*>(indices.data);
    int64_t rows = 1;
    for (int d = 0; d < bound.dims; ++d) rows *= tensors[bound.rows_of].sizes[d];
    const int64_t count = indices.sizes[0] < tokens ? indices.sizes[0] : tokens;
    bool all = true;
    for (int64_t i = 0; i < count; ++i) all &= values[i] < rows && (bound.padded || values[i] >= 0);
    return all;
}

// An optional argument is a null pointer or points to the value; this is that value, or 0.
StableIValue inner(const Op& op, const StableIValue* args, int index) {
    if (op.arg_types[index] != 'O') return args[index];
    const auto* box = as<const StableIValue*>(args[index]);
    return box ? *box : 0;
}

// Launches the call if `entry` is for it. On success `results` holds new tensors.
bool run(const Op& op, const Entry& entry, const StableIValue* args, AtenTensorHandle* results) {
    for (const Constant& constant : entry.constants) {
        const int64_t value = constant.is_bool ? as<bool>(args[constant.arg]) : as<int64_t>(args[constant.arg]);
        if (value != constant.value) return false;
    }
    Tensor tensors[MAX_ARGS];
    int64_t tokens = -1;
    for (const TensorGuard& guard : entry.tensors) {
        const auto handle = as<AtenTensorHandle>(inner(op, args, guard.arg));
        if (!handle || !look_at(handle, guard, entry, tensors[guard.arg], tokens)) return false;
    }

    if (tokens > INT32_MAX) return false;  // kernels count them in 32 bits
    const Variant* variant = &entry.variants.front();
    while (variant != &entry.variants.back() && tokens > variant->up_to_tokens) ++variant;
    if (!variant->function) return false;
    for (const TensorGuard& guard : entry.tensors)
        if (!aligned(tensors[guard.arg], guard, variant->align)) return false;

    if (!entry.on_gpu)
        for (const Bound& bound : entry.bounds)
            if (!in_bounds(bound, tensors, tokens)) return false;  // Python says which

    size_t made = 0;
    try {
        void* data[MAX_ARGS];
        for (const Result& result : entry.results) {
            int64_t sizes[MAX_DIMS], strides[MAX_DIMS], stride = 1;
            for (int d = result.dims - 1; d >= 0; --d) {
                sizes[d] = result.sizes[d] < 0 ? rounded_up(tokens, result.round_tokens) : result.sizes[d];
                strides[d] = stride;
                stride *= sizes[d] > 1 ? sizes[d] : 1;
            }
            if (result.column_major) {
                strides[0] = 1;
                strides[1] = rounded_up(sizes[0] > 1 ? sizes[0] : 1, result.column_major);
            }
            if (aoti_torch_empty_strided(result.dims, sizes, strides, result.dtype, entry.device_type, entry.device_index,
                                         &results[made]))
                throw std::runtime_error("autofuse: results cannot be allocated: out of memory");
            ++made;
            aoti_torch_get_data_ptr(results[made - 1], &data[made - 1]);
        }
        if (tokens == 0) return true;

        alignas(16) char params[MAX_PARAMS_BYTES];
        for (const Field& field : entry.fields) {
            char* to = params + field.offset;
            switch (field.kind) {
                case POINTER: memcpy(to, &tensors[field.index].data, sizeof(void*)); break;
                case RESULT: memcpy(to, &data[field.index], sizeof(void*)); break;
                case STRIDE: memcpy(to, &tensors[field.index].strides[field.dim], sizeof(int64_t)); break;
                case NOTHING: memset(to, 0, sizeof(void*)); break;
                case SIZE: {
                    const int32_t size = int32_t(tensors[field.index].sizes[field.dim]);
                    memcpy(to, &size, sizeof size);
                    break;
                }
                case TOKENS: {
                    const int32_t count = int32_t(tokens);
                    memcpy(to, &count, sizeof count);
                    break;
                }
                case FLAG: {
                    const int32_t flag = as<bool>(args[field.index]);
                    memcpy(to, &flag, sizeof flag);
                    break;
                }
                case FLOAT: {
                    const float value = float(as<double>(args[field.index]));
                    memcpy(to, &value, sizeof value);
                    break;
                }
            }
        }
        if (entry.on_gpu) {
            const auto blocks = [=](int64_t per_token, int64_t per_block) {
                return (tokens * per_token + per_block - 1) / per_block;
            };
            const int64_t repeated = blocks(variant->units_per_token, variant->units_per_block) * variant->repeat;
            launch_cuda(entry, *variant, repeated + blocks(variant->more_per_token, variant->more_per_block), params);
        } else {
            reinterpret_cast<void (*)(const void*)>(variant->function)(params);
        }
    } catch (...) {
        for (size_t i = 0; i < made; ++i) aoti_torch_delete_tensor_object(results[i]);
        throw;
    }
    return true;
}

void release(const Op& op, const StableIValue* args) {
    for (size_t i = 0; i < op.arg_types.size(); ++i) {
        if (op.arg_types[i] == 'T') aoti_torch_delete_tensor_object(as<AtenTensorHandle>(args[i]));
        if (op.arg_types[i] == 'O' && args[i]) {
            aoti_torch_delete_tensor_object(as<AtenTensorHandle>(inner(op, args, int(i))));
#if defined(TORCH_VERSION_2_13_0) && TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
            torch_delete_stable_ivalue(as<StableIValue*>(args[i]));
#else
            delete as<StableIValue*>(args[i]);
#endif
        }
        if (op.arg_types[i] == 's') torch_delete_string(as<StringHandle>(args[i]));
    }
}

void call(const Op& op, StableIValue* stack, uint64_t outputs) {
    AtenTensorHandle results[MAX_ARGS];
    const char* plan = nullptr;
    size_t length = 0;
    const StringHandle plan_handle = as<StringHandle>(stack[op.arg_types.size() - 1]);
    torch_string_c_str(plan_handle, &plan);
    torch_string_length(plan_handle, &length);
    const Entries* entries = op.entries.load(std::memory_order_acquire);
    const auto known = entries ? entries->find(std::string_view(plan, length)) : Entries::const_iterator();
    if (entries && known != entries->end()) {
        for (const Entry* entry : known->second) {
            bool done = false;
            try {
                done = run(op, *entry, stack, results);
            } catch (...) {
                release(op, stack);
                throw;
            }
            if (done) {
                release(op, stack);
                for (uint64_t i = 0; i < outputs; ++i) memcpy(&stack[i], &results[i], sizeof results[i]);
                return;
            }
        }
    }
    python_error.clear();
    // Takes over the arguments and leaves the results; but strings it would leak, so the plan goes beside it.
    current_plan = plan;
    const bool failed = torch_call_dispatcher(op.unbound.c_str(), "", stack, TORCH_ABI_VERSION);
    torch_delete_string(plan_handle);
    if (failed) throw std::runtime_error(op.unbound + " failed; see the message above");
    if (!python_error.empty()) {
        for (uint64_t i = 0; i < outputs; ++i) aoti_torch_delete_tensor_object(as<AtenTensorHandle>(stack[i]));
        if (python_error_is_value_error) throw c10::ValueError({__func__, __FILE__, uint32_t(__LINE__)}, python_error);
        throw std::runtime_error(python_error);
    }
}

// PyTorch hands a kernel no user data: one function for each op.
template <int SLOT>
void boxed(StableIValue* stack, uint64_t, uint64_t outputs) {
    call(ops[SLOT], stack, outputs);
}

typedef void (*Boxed)(StableIValue*, uint64_t, uint64_t);

template <int... SLOTS>
Boxed boxed_at(int slot, std::integer_sequence<int, SLOTS...>) {
    static constexpr Boxed all[] = {boxed<SLOTS>...};
    return all[slot];
}

}  // namespace

extern "C" {

void autofuse_set_cuda(const Cuda* functions) { cuda = *functions; }

// The plan of the call that the Python implementation is serving in this thread.
const char* autofuse_current_plan() { return current_plan; }

// Said by the Python implementation in place of an exception, whose text the C ABI would lose.
void autofuse_set_error(const char* message, int is_value_error) {
    python_error = message;
    python_error_is_value_error = is_value_error != 0;
}

// Registers op `slot` (0 to MAX_OPS-1) for a dispatch key, "CPU" or "CUDA". Returns 0, or -1 if PyTorch refuses.
int autofuse_register(int slot, const char* name, const char* unbound, const char* arg_types, const char* key) {
    if (slot >= MAX_OPS || strlen(arg_types) > MAX_ARGS) return -1;
    ops[slot].entries.store(nullptr);
    ops[slot].unbound = unbound;
    ops[slot].arg_types = arg_types;
    TorchLibraryHandle library = nullptr;
    if (aoti_torch_library_init_impl("autofuse", key, __FILE__, __LINE__, &library)) return -1;
    const Boxed function = boxed_at(slot, std::make_integer_sequence<int, MAX_OPS>());
    return torch_library_impl(library, name, function, TORCH_ABI_VERSION) ? -1 : 0;
}

void autofuse_bind(int slot, const char* plan, int on_gpu, int device_type, int device_index, int tensor_count,
                   const TensorGuard* tensors, int constant_count, const Constant* constants, int field_count,
                   const Field* fields, int result_count, const Result* results, int variant_count,
                   const Variant* variants, int bound_count, const Bound* bounds) {
    auto* entry = new Entry;
    entry->plan = plan;
    entry->device_type = device_type;
    entry->device_index = device_index;
    entry->on_gpu = on_gpu != 0;
    entry->context = nullptr;
    if (entry->on_gpu) cuda.get_context(&entry->context);
    entry->tensors.assign(tensors, tensors + tensor_count);
    entry->constants.assign(constants, constants + constant_count);
    entry->fields.assign(fields, fields + field_count);
    entry->results.assign(results, results + result_count);
    entry->variants.assign(variants, variants + variant_count);
    entry->bounds.assign(bounds, bounds + bound_count);
    const std::lock_guard<std::mutex> lock(binding);
    const Entries* before = ops[slot].entries.load();
    auto* after = before ? new Entries(*before) : new Entries;
    auto& same_plan = (*after)[entry->plan];
    same_plan.insert(same_plan.begin(), entry);
    ops[slot].entries.store(after, std::memory_order_release);
}
}
