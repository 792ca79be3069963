"""The plugin library for TensorRT: C++ sources, generated tables, build and loading."""
