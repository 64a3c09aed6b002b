"""Raw CUDA kernels: one .cu and one short wrapper each, compiled at run time. Imports nothing else of this project.

`compile` turns a .cu into PTX and machine code, `launch` runs it on a GPU through CuPy, and `simulator` runs
the same PTX on a CPU, which is how the tests execute every kernel where there is no GPU.
"""
