"""From rows to packed tokens.

`rows` reads JSONL and Parquet, `datasets` finds and splits a data set, `embedded` builds the two that come along, `rendering` and
`encoding` tokenise with the loss on answers, `sample_order` shuffles and `packing` fills rows of one length.
"""
