"""Triton's interpreter without work that changes no result: about half of its time.

What a version of Triton does not have is left as it is.
"""

from dataclasses import replace


def install():
    import triton.language as tl
    from triton.language import semantic
    from triton.runtime import interpreter

    _skip_overflow_checks(interpreter)
    _patch_language_once(interpreter, tl)
    _remember_types(interpreter, tl)
    _skip_broadcasts(semantic)


def _skip_overflow_checks(interpreter):
    """It computes every 32-bit index again in 64 bits; no tensor here has an index near 2³¹."""
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _patch_language_once(interpreter, tl):
    """It patches `triton.language` at every call of a device function; once a launch is enough."""
    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton patches in another way
        return
    patch = interpreter._patch_lang

    def patch_once(fn):
        seen = [lang for lang in (tl, tl.core) if any(v is lang for v in fn.__globals__.values())]
        if any(tl.core.is_builtin(lang.load) for lang in seen):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def _remember_types(interpreter, tl):
    """It makes the type of every result anew, with its name, and the shape of every tensor."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    np_dtype = interpreter._get_np_dtype
    types, shapes, dtypes = {}, {}, {}

    def values(shape):
        return tuple([getattr(size, "value", size) for size in shape])

    def block_type(self, element_ty, shape):
        key = type(element_ty), element_ty.name, values(shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def tensor(self, handle, type):
        if not type.is_block():
            make_tensor(self, handle, type)
            return
        key = values(type.shape)
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    def get_np_dtype(ty):
        key = type(ty), ty.name
        if key not in dtypes:
            dtypes[key] = np_dtype(ty)
        return dtypes[key]

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = get_np_dtype


def _skip_broadcasts(semantic):
    """It computes the common shape of two operands also if theirs are equal."""
    full = semantic.TritonSemantic.broadcast_impl_value

    def broadcast(self, lhs, rhs):
        blocks = lhs.type.is_block(), rhs.type.is_block()
        if blocks == (False, False) or (blocks == (True, True) and same(lhs.type, rhs.type)):
            return lhs, rhs
        return full(self, lhs, rhs)

    def same(a, b):
        return [*a.get_block_shapes()] == [*b.get_block_shapes()]

    semantic.TritonSemantic.broadcast_impl_value = broadcast
