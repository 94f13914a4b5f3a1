"""What the papers stand on: grids, options, readings, tables."""
