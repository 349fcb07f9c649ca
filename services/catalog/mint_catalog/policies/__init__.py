"""Policy records: heads, how they are made and listed, their revisions, evaluations, rollouts and blobs."""
