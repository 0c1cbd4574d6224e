"""The runtime that stands for a GPU: it counts, and it refuses what CUDA would refuse.

Under a CUDA build of PyTorch `make dry-gpu` takes it through the GPU tests.
"""

import ctypes
import shutil
import subprocess
from ctypes import byref, c_char_p, c_int, c_uint, c_uint64, c_void_p
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "dry_gpu" / "runtime.cpp"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
BF16, NO_SWIZZLE, SWIZZLE_128 = 9, 0, 3


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("dry_gpu") / "libdry.so"
    subprocess.run(
        ["nvcc", "-std=c++17", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-Wall,-Wextra",
         "-Werror", "all-warnings", str(SOURCE), "-o", str(built), "-ldl"],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return ctypes.CDLL(str(built))


@pytest.fixture
def gpu(library):
    library.dry_reset()
    library.dry_name.restype = c_char_p
    yield library
    library.cudaGetLastError()


class Dim3(ctypes.Structure):
    _fields_ = [("x", c_uint), ("y", c_uint), ("z", c_uint)]


def memory(gpu, size=1 << 20):
    p = c_void_p()
    assert gpu.cudaMalloc(byref(p), ctypes.c_size_t(size)) == 0
    return p


def stream(gpu):
    s = c_void_p()
    assert gpu.cudaStreamCreateWithPriority(byref(s), 0, 0) == 0
    return s


def function(gpu, name=b"kernel"):
    module, f = c_void_p(), c_void_p()
    assert gpu.cuModuleLoadData(byref(module), None) == 0
    assert gpu.cuModuleGetFunction(byref(f), module, name) == 0
    return f


def start(gpu, f, grid=(1, 1, 1), block=(128, 1, 1), shared=0, on=None):
    return gpu.cuLaunchKernel(f, *map(c_uint, (*grid, *block, shared)), on, None, None)


def test_launches_are_counted_by_name(gpu):
    f = function(gpu, b"one")
    assert start(gpu, f) == 0 and start(gpu, function(gpu, b"two"), on=stream(gpu)) == 0
    assert gpu.dry_launches() == 2 and gpu.dry_errors() == 0
    assert [gpu.dry_name(i) for i in range(2)] == [b"one", b"two"]
    gpu.dry_launch(b"of a library")
    assert gpu.dry_launches() == 3 and gpu.dry_name(2) == b"of a library"


@pytest.mark.parametrize(
    "sizes",
    [{"grid": (0, 1, 1)}, {"grid": (1, 65536, 1)}, {"block": (1024, 2, 1)}, {"block": (1, 1, 65)},
     {"shared": (48 << 10) + 1}],
    ids=str,
)  # fmt: skip
def test_launches_that_cuda_refuses(gpu, sizes, capfd):
    assert start(gpu, function(gpu, b"named"), **sizes) != 0
    assert gpu.dry_errors() == 1 and gpu.dry_launches() == 0
    assert "dry GPU: error" in capfd.readouterr().err


def test_shared_memory_is_asked_for(gpu):
    f = function(gpu)
    attribute = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert gpu.cuFuncSetAttribute(f, attribute, 227 << 10) == 0
    assert start(gpu, f, shared=227 << 10) == 0
    assert gpu.cuFuncSetAttribute(f, attribute, (227 << 10) + 1) != 0


def test_memory_is_the_hosts(gpu):
    p, free, total = memory(gpu), ctypes.c_size_t(), ctypes.c_size_t()
    data = (c_int * 4)(1, 2, 3, 4)
    back = (c_int * 4)()
    assert gpu.cudaMemcpy(p, data, ctypes.c_size_t(16), 1) == 0
    assert gpu.cudaMemcpy(back, p, ctypes.c_size_t(16), 2) == 0
    assert list(back) == [1, 2, 3, 4]
    assert [gpu.dry_name(i) for i in range(2)] == [b"memcpy H2D", b"memcpy D2H"]
    gpu.cudaMemGetInfo(byref(free), byref(total))
    assert total.value - free.value >= 1 << 20
    assert gpu.cudaMalloc(byref(c_void_p()), ctypes.c_size_t(total.value)) == 2, "out of memory"
    assert gpu.cudaFree(p) == 0 and gpu.cudaFree(p) != 0


def test_rules_of_a_capture(gpu):
    """Work on other streams and waits are refused; a graph launches what was captured."""
    f, s, graph, runnable = function(gpu), stream(gpu), c_void_p(), c_void_p()
    assert gpu.cudaStreamBeginCapture(None, 0) != 0
    assert gpu.cudaStreamBeginCapture(s, 0) == 0
    assert start(gpu, f, on=s) == 0 and start(gpu, f, on=s) == 0
    assert start(gpu, f, on=None) != 0 and start(gpu, f, on=stream(gpu)) != 0
    assert gpu.cudaStreamSynchronize(s) != 0 and gpu.cudaDeviceSynchronize() != 0
    event, joined = c_void_p(), stream(gpu)
    gpu.cudaEventCreate(byref(event))
    gpu.cudaEventRecord(event, s)
    assert gpu.cudaStreamWaitEvent(joined, event, 0) == 0 and start(gpu, f, on=joined) == 0
    assert gpu.cudaStreamEndCapture(s, byref(graph)) == 0
    assert gpu.cudaDeviceSynchronize() == 0
    assert gpu.cudaGraphInstantiateWithFlags(byref(runnable), graph, c_uint64(0)) == 0
    gpu.dry_reset()
    assert gpu.cudaGraphLaunch(runnable, s) == 0 and gpu.dry_launches() == 3


def test_user_objects_of_graphs(gpu):
    """A graph's destructor runs when the graph and every executable of it are gone."""
    s, graph, runnable, other = stream(gpu), c_void_p(), c_void_p(), c_void_p()
    gone, active = [], c_int()
    destructor = ctypes.CFUNCTYPE(None, c_void_p)(gone.append)
    ids = []
    for i in (1, 2):
        assert gpu.cudaStreamBeginCapture(s, 0) == 0
        inside, number, held = c_void_p(), c_uint64(), c_void_p()
        info = byref(active), byref(number), byref(inside), None, None
        assert gpu.cuStreamGetCaptureInfo_v2(s, *info) == 0 and active.value == 1
        assert gpu.cuUserObjectCreate(byref(held), c_void_p(i), destructor, 1, 1) == 0
        assert gpu.cuGraphRetainUserObject(inside, held, 1, 1) == 0
        assert gpu.cudaStreamEndCapture(s, byref(graph)) == 0
        ids.append(number.value)
        for executable in (runnable, other)[: 3 - i]:
            gpu.cudaGraphInstantiateWithFlags(byref(executable), graph, c_uint64(0))
        assert gpu.cudaGraphDestroy(graph) == 0 and not gone
        if i == 1:
            assert gpu.cudaGraphExecDestroy(runnable) == 0 and not gone
            assert gpu.cudaGraphExecDestroy(other) == 0 and gone.pop() == 1
    assert gpu.cudaGraphExecDestroy(runnable) == 0 and gone.pop() == 2
    assert ids[0] != ids[1]
    assert gpu.cuStreamGetCaptureInfo_v2(s, *info) == 0 and active.value == 0


def test_products_run_on_the_stream_of_their_handle(gpu):
    """Of that handle alone; a cublasLt product runs on the stream that it is given."""
    s, handle, other, graph = stream(gpu), c_void_p(), c_void_p(), c_void_p()
    for h in (handle, other):
        assert gpu.cublasCreate_v2(byref(h)) == 0
    assert gpu.cublasSetStream_v2(handle, s) == 0
    assert gpu.cudaStreamBeginCapture(s, 0) == 0
    assert gpu.cublasSgemm_v2(handle) == 0 and gpu.cublasSgemm_v2(other) != 0
    # In PyTorch 2.14 a cublasLt handle is one of cuBLAS whose stream nothing has set.
    before = [other, *[None] * 13, ctypes.c_size_t(0)]
    assert gpu.cublasLtMatmul(*before, s) == 0 and gpu.cublasLtMatmul(*before, None) != 0
    assert gpu.cudaStreamEndCapture(s, byref(graph)) == 0
    assert gpu.dry_errors() == 2
    assert [gpu.dry_name(i) for i in range(2)] == [b"cublasSgemm_v2", b"cublasLtMatmul"]


def encode(gpu, address, dims, strides, box, swizzle=NO_SWIZZLE):
    room = (ctypes.c_char * 256)()
    aligned = (ctypes.addressof(room) + 127) // 128 * 128
    n = len(dims)
    return gpu.cuTensorMapEncodeTiled(
        c_void_p(aligned), BF16, n, c_void_p(address), (c_uint64 * n)(*dims),
        (c_uint64 * n)(*strides), (c_uint * n)(*box), (c_uint * n)(*([1] * n)), 0, swizzle, 0, 0,
    )  # fmt: skip


def test_rules_of_tensor_maps(gpu):
    """Alignment, box and swizzle of the driver's manual; only of memory that the device has."""
    p = memory(gpu).value
    assert encode(gpu, p, [64, 8], [128], [64, 8], SWIZZLE_128) == 0
    assert gpu.dry_descriptors() == 1
    assert encode(gpu, p + 8, [64, 8], [128], [64, 8]) != 0
    assert encode(gpu, p, [64, 8], [136], [64, 8]) != 0
    assert encode(gpu, p, [512, 8], [1024], [512, 8]) != 0
    assert encode(gpu, p, [128, 8], [256], [128, 8], SWIZZLE_128) != 0
    assert encode(gpu, p, [64, 0], [128], [64, 8]) != 0
    assert encode(gpu, ctypes.addressof(c_int()) // 16 * 16, [64, 8], [128], [64, 8]) != 0
    assert gpu.dry_errors() == 6


def test_im2col_corners(gpu):
    p, room = memory(gpu).value, (ctypes.c_char * 256)()
    aligned = (ctypes.addressof(room) + 127) // 128 * 128

    def im2col(lower, upper, channels=64, pixels=128):
        return gpu.cuTensorMapEncodeIm2col(
            c_void_p(aligned), BF16, 4, c_void_p(p), (c_uint64 * 4)(64, 14, 14, 2),
            (c_uint64 * 3)(128, 1792, 25088), (c_int * 2)(*lower), (c_int * 2)(*upper), channels,
            pixels, (c_uint * 4)(1, 1, 1, 1), 0, SWIZZLE_128, 0, 0,
        )  # fmt: skip

    assert im2col((-1, -1), (-1, -1)) == 0
    assert im2col((-129, -1), (-1, -1)) != 0 and im2col((0, 0), (-14, 0)) != 0
    assert im2col((-1, -1), (-1, -1), channels=512) != 0
    assert im2col((-1, -1), (-1, -1), pixels=1025) != 0
