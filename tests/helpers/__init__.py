"""What several tests need: networks, requests, commands, rows, packed batches and newcomers, each defined once."""
