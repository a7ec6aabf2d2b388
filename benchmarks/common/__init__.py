"""Parts that several benchmarks share: tables and dated reports, records, charts, the machine, synthetic datasets."""
