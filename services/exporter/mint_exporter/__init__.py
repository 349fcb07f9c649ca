"""The exporter: from a training state to a published revision, PEFT adapters in and out, and bytes for clients
without the store.

====================  ========================================================================
``export``              training states in: fetch, then publish
``imports``             PEFT adapters in: uploaded weights and archives, objects in the store
``archives``            what is taken out of an archive, and what makes it refused
``tar_stream``          a tar reader that believes nothing
``publishing``          pack, sign, keep, publish: every step safe to repeat
``reading``             revisions out: PEFT folders, differences
``keeping``             stage, upload, read back, mark verified
``uploads``             resumable uploads and downloads
``scratch``             bounded disk space, empty at start
``model``               the words of this room and what it asks of the catalog
``clients``             the catalog over gRPC
``service``, ``app``    decode, one domain call, encode; how it is put together
====================  ========================================================================

It owns nothing durable: killed at any point, what it leaves is swept at the next start, and nothing half-made is
visible.
"""
