"""A structure for tests that have no run, and need nothing that runs need."""

from distpc.structures.region_graph import Region, RegionGraph


def hidden_tree(num_variables: int, num_states: int) -> RegionGraph:
    """A hidden binary tree, variable v below (v - 1) // 2, with emissions tied in threes."""
    regions: list[Region] = []
    below: dict[int, list[int]] = {}
    for variable in reversed(range(num_variables)):
        tie = f"emission/{variable % 3}"
        regions.append(Region("input", num_states, variable=variable, tie=tie))
        children = (len(regions) - 1, *below.get(variable, ()))
        regions.append(Region("product", num_states, children, latent=variable))
        num_units = num_states if variable else 1
        regions.append(Region("sum", num_units, (len(regions) - 1,)))
        below.setdefault((variable - 1) // 2, []).append(len(regions) - 1)
    return RegionGraph(regions, num_variables)
