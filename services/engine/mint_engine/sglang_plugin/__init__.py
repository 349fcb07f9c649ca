"""What MinT adds to SGLang, through SGLang's own two plugin entry points.

* ``sglang.srt.platforms`` → :func:`mint_engine.sglang_plugin.platform.activate`, run in every SGLang process before
  anything else of it: closes import-time gaps on machines without a GPU.
* ``sglang.srt.plugins`` → :func:`mint_engine.sglang_plugin.hooks.register`, run in every SGLang process before the
engine
  starts: the hooks listed there, one file per concern.

With CUDA present no kernel is touched; only the hooks that guard adapters stay. SGLang logs what plugins raise and goes
on, so nothing here relies on raising: :func:`~mint_engine.sglang_plugin.hooks.register` ends its process with one
sentence, and the host asks every scheduler for a self-check before it serves. Modules import SGLang inside functions,
never on import: SGLang's import order decides what can still be changed.
"""
