"""What was measured: records, tables, charts."""
