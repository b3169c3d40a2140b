"""The metrics of the field's benchmarks, equal to their official code; golden cases stand in the tests."""
