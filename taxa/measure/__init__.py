"""What a model holds, computes and keeps: memory, operations, the tree."""
