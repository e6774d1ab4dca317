"""Laws: what holds for every node, grid, method and search, each written once and run over the registries."""
