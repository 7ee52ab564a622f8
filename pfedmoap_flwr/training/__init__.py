"""What clients compute: local training and evaluation. Plain PyTorch, no Flower."""
