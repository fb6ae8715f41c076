"""Services for all other packages: files, memory, compute devices, settings, keyword options and progress reports."""
