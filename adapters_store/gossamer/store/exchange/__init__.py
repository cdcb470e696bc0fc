"""Other people's adapters in, ours out: one file a format, listed in `registry`.

An importer reads a foreign adapter (`files.Files`) for a base (`base.BaseWeights`) into a
`DeltaSet`; an exporter writes a `DeltaSet` as files that the other library loads. Both work a
tensor at a time: the peak of memory is the largest tensor and the result.
"""
