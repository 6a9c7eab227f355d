// The op of faulty_op.py on a CPU. FAULT says what goes wrong, by its place in CPU_FAULTS.
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#if FAULT == 15
#error this config does not compile
#endif

struct Params {
    float* x;
    float* cache;
    float* doubled;
    float* negated;
    int32_t tokens;
};

static int calls = 0;

extern "C" void faulty(const Params* params) {
    const Params p = *params;
    const int64_t count = int64_t(p.tokens) * WIDTH;
    volatile int zero = 0, number = 12;
    if (FAULT == 1) *(volatile int*)8 = 1;
    if (FAULT == 2) number = number / zero;
    if (FAULT == 3) __builtin_trap();
    if (FAULT == 4)
        while (!zero) {
        }
    if (FAULT == 5) abort();
    if (FAULT == 6) exit(3);
    if (FAULT == 7) kill(getpid(), SIGKILL);
    const char* finale = getenv("FAULTY_FINALE");
    if (FAULT == 16 && finale && access(finale, F_OK) == 0) abort();
    if (FAULT == 17) setenv("FAULTY_SPOILT", "1", 1);
    if (FAULT == 18 && getenv("FAULTY_SPOILT")) abort();
    if (FAULT == 19) {
        kill(getppid(), SIGKILL);
        sleep(60);
    }

    const int64_t written = FAULT == 11 ? count - WIDTH : count;
    for (int64_t i = 0; i < written; ++i) {
        p.doubled[i] = 2 * p.x[i];
        p.negated[i] = -p.x[i];
    }
    for (int64_t i = 0; i < 8 * WIDTH && i < count; ++i) p.cache[i] = p.x[i];
    if (FAULT == 8) p.negated[count] = 1;
    if (FAULT == 9) p.doubled[-1] = 1;
    if (FAULT == 10) p.cache[8 * WIDTH + 3] = 1;
    if (FAULT == 12) p.doubled[count / 2] = __builtin_nanf("");
    if (FAULT == 13) p.doubled[0] *= 1 + 1e-6f * (++calls % 2);
    if (FAULT == 14) p.x[count - 1] += 1;
}
