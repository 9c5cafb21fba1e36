"""The kernels for CPUs, in C++, and the library of them that this machine loads."""
