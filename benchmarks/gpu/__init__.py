"""What a card does with shapes of real models, without weights: `python -m benchmarks.gpu`."""
