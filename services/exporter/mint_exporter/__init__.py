"""The exporter: from a training state to a published revision, and bytes in and out for clients without the store.

====================  ========================================================================
``export``              the way of one export, step by step, each safe to repeat
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
