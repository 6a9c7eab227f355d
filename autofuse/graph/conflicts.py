"""Which of the sites that could be fused are fused together, and in which order they are rewritten.

Two sites are rivals where they replace one node; and where each reads, behind whatever other nodes, a result of the
other: as two calls, neither could come first. So may more than two be, around a circle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from torch.fx import Graph, Node

from autofuse.graph.decide import Decision
from autofuse.graph.fusions import Fusion, Site

__all__ = ["Decided", "needs_of", "without_conflicts", "without_overlaps"]

Decided = tuple[Fusion, Site, Decision]


def without_conflicts(graph: Graph, decided: Sequence[Decided]) -> tuple[list[Decided], list[int]]:
    """(the same sites, but of those to be fused no two that are rivals; the indices of those, in the order in which
    they are to be rewritten)

    Of rivals, those that save more time are kept. A site is rewritten before those whose results it reads: the nodes
    that it names are still there then, and what takes their place later is put into the new nodes, too.
    """
    given = list(decided)
    while True:
        kept = without_overlaps(given)
        fused = {index: site for index, (_, site, decision) in enumerate(kept) if decision.fuses}
        try:
            # Where nothing else decides, the last of the graph first.
            fused = dict(sorted(fused.items(), key=lambda item: item[1].first))
            return kept, [*TopologicalSorter(needs_of(graph, fused)).static_order()][::-1]
        except CycleError as error:
            _leave_one(given, error.args[1][:-1])


def without_overlaps(decided: Sequence[Decided]) -> list[Decided]:
    """The same sites, but of those to be fused no two that replace one node: what saves more time is kept.

    Among sites that nobody measured, it is the one that replaces more nodes. One after the other, the best first; which
    set of sites would save the most in all is not searched.
    """
    wanted = [index for index, (_, _, decision) in enumerate(decided) if decision.fuses]
    wanted.sort(key=lambda index: _worth(*decided[index][1:]), reverse=True)
    taken: dict[Node, int] = {}
    result = list(decided)
    for rank, index in enumerate(wanted):
        _, site, decision = decided[index]
        nodes = site.nodes
        rivals = [taken[node] for node in nodes if node in taken]
        if not rivals:
            taken.update(dict.fromkeys(nodes, rank))
            continue
        _, winner, better = decided[wanted[min(rivals)]]
        won, this = _merit(winner, better), _merit(site, decision)
        reason = f"{winner.op} ({winner.fusion}) replaces nodes of it and {won}; this one {this}"
        _leave(result, index, "overlap", reason)
    return result


def needs_of(graph: Graph, sites: Mapping[int, Site]) -> dict[int, list[int]]:
    """For each of the sites, which share no node, the others whose results it reads, behind other nodes or not."""
    owner = {node: index for index, site in sites.items() for node in site.nodes}
    same = {node: where for site in sites.values() for node, where in site.spared.items()}
    bit = {index: 1 << place for place, index in enumerate(sites)}
    needs = dict.fromkeys(sites, 0)
    above: dict[Node, int] = {}  # the sites whose results a node is made of, up to the nearest ones
    for node in graph.nodes:
        index, found = owner.get(node), 0
        for read in (same[node],) if node in same else node.all_input_nodes:
            found |= above[read]
        if index is None or node in same:
            above[node] = found
        else:
            above[node] = bit[index]
            needs[index] |= found
    return {index: [other for other, its in bit.items() if needs[index] & its and other != index] for index in sites}


def _leave_one(decided: list[Decided], cycle: Sequence[int]) -> None:
    """Leaves alone that site of a cycle, each of whose sites reads a result of the next or of the one before, that is
    worth least.
    """
    lost = min(cycle, key=lambda index: (*_worth(*decided[index][1:]), -index))
    others = [decided[index] for index in cycle if index != lost]
    names = " and ".join(f"{site.op} ({site.fusion}, {_merit(site, decision)})" for _, site, decision in others)
    _, site, decision = decided[lost]
    reason = f"it and {names} read each other's results, around a circle; this one {_merit(site, decision)}"
    _leave(decided, lost, "cycle", reason)


def _leave(decided: list[Decided], index: int, rule: str, reason: str) -> None:
    fusion, site, decision = decided[index]
    decided[index] = (fusion, site, replace(decision, plan=None, rewrites=False, rule=rule, reason=reason))


def _worth(site: Site, decision: Decision) -> tuple[bool, float, int]:
    return decision.saved_us is not None, decision.saved_us or 0.0, len(site.nodes)


def _merit(site: Site, decision: Decision) -> str:
    if decision.saved_us is None:
        return (
            f"{'cannot be measured' if decision.rewrites else 'was never tuned'} and replaces {len(site.nodes)} nodes"
        )
    return f"saves {decision.saved_us:.2f} µs"
