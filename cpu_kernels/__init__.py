"""Raw CPU kernels in C++: one source and one short wrapper each, compiled at first use by the machine's own compiler.

`compile` makes one library of all sources; `library` loads it and calls kernels, or records calls on a `tape`. The
package imports nothing else of this project.
"""
