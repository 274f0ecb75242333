"""What users write and what artifacts say: strict, frozen pydantic specs. Imports nothing but pydantic, PyYAML and the standard library.

`loading.load_contract` reads a YAML file into a spec; `errors` is the one exception tree; `names` holds the rules for names.
"""
