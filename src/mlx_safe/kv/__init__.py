"""KV caches on disk: the store, which knows files and no MLX.

`format` is what a file holds. `files` and `directory` make and remove files, `store`
finds those that serve a prompt, `writer` is the thread that writes them. `identity`
says which model they are of. `server.kv_tier` makes bytes of caches and caches of
bytes.

What is kept are **nodes**. A *block* has the slots of 256 tokens of every cache that
only grows, and follows another block. A *snapshot* has the whole of every other cache
(windows, recurrent states) after some number of tokens, and the slots since the last
full block. A file is written once and never changed.
"""
