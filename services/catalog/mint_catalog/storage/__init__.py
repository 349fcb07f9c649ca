"""The key-value store: the contract, etcd behind it, and transactions, listings, watches and duties over it."""
