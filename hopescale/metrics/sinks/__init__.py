"""Where recorded numbers go: console, JSON lines, TensorBoard, Prometheus. One file each, imported on use."""
