"""What the tests share: the tiny model, servers in child processes, clients."""
