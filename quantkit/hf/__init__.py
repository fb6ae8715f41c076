"""The only package that imports transformers: loading models, describing their structure, and running them."""
