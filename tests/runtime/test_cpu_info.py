"""The processor's claims: AMX that is announced and cannot be used must not kill the process."""

import os
import subprocess
import sys

import pytest

from resnet_fast.runtime import cpu_info

PROCESSOR = """\
processor\t: 0
model name\t: A Processor
cpuid level\t: {level}
flags\t\t: fpu avx2 fma avx512f {flags}

processor\t: 1
model name\t: Another
"""


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Writes the file that the processor is read from; no ISA is asked for."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(cpu_info, "CPUINFO", tmp_path / "cpuinfo")

    def write(level, flags):
        cpu_info.CPUINFO.write_text(PROCESSOR.format(level=level, flags=flags))

    return write


@pytest.mark.parametrize(
    ("level", "flags", "unusable"),
    [(28, "amx_tile amx_bf16", True), (31, "amx_tile amx_bf16", False), (28, "avx512_bf16", False)],
    ids=["hidden", "usable", "none"],
)
def test_unusable_amx(cpuinfo, level, flags, unusable):
    cpuinfo(level, flags)
    assert cpu_info.name() == "A Processor"
    assert cpu_info.isas() == ["avx2", "fma", "avx512f", *sorted(flags.split(), reverse=True)]
    assert cpu_info.keep_onednn_from_unusable_amx() is unusable
    assert os.environ.get("ONEDNN_MAX_CPU_ISA") == (cpu_info.WITHOUT_AMX if unusable else None)


def test_what_the_user_says_wins(cpuinfo, monkeypatch):
    cpuinfo(28, "amx_tile")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert cpu_info.keep_onednn_from_unusable_amx()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def test_no_file_says_nothing(cpuinfo):
    assert cpu_info.name()
    assert cpu_info.isas() == []
    assert not cpu_info.keep_onednn_from_unusable_amx()


def test_bf16_products_after_the_import():
    """In a fresh process, as a user's: PyTorch's own bf16 product of matrices does not kill it."""
    code = "import resnet_fast, torch; a = torch.ones(256, 256).bfloat16(); print((a @ a)[0, 0])"
    env = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "256" in done.stdout
