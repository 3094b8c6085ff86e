"""What every benchmark uses: shapes, peers, the correctness gate, interleaved timing, memory, tables, pictures."""
