"""The machine: files, memory, compute devices and progress reports."""
