"""What the three papers share: mesh, sharding, layers, train loop, data, checkpoints, results."""
