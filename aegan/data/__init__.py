"""Images: files decoded, shards read, designed faces drawn."""
