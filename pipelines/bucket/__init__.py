"""What lies in a bucket: objects, runs, shards; the only boto3."""
