"""The engine room: one SGLang with a resident base, asked by digest only.

``adapter_engine`` is the port every engine fulfils, ``sglang_engine`` the one that serves, ``host`` the rules that keep
a wrong adapter from ever answering, ``sglang_plugin`` what SGLang itself needs changed.
"""
