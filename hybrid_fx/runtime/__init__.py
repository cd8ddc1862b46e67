"""What a plan runs on: the KV workspace, sessions and prepared tensors."""
