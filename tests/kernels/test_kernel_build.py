"""Building a kernel: once per content, under a lock, never half-written."""

import ctypes
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spikescale.kernels import build
from spikescale.kernels.build import BuildError

SOURCE = '#include "simd.h"\nextern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "toy" / "toy.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE.replace("ANSWER", "41"))
    return path


def counting_compiler(tmp_path):
    """A compiler that leaves a line behind for each compilation, and takes its time."""
    log = tmp_path / "compilations"
    script = tmp_path / "counting-g++"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo compiled >> {log}; sleep 0.3;; esac\n'
        f'exec {build.find_compiler()} "$@"\n'
    )
    script.chmod(0o755)
    return str(script), log


def _build_and_call(source, compiler, results):
    results.put(ctypes.CDLL(str(build.build(source, compiler=compiler))).answer())


def test_a_library_is_compiled_once_and_again_when_its_source_changes(source, tmp_path):
    compiler, log = counting_compiler(tmp_path)
    first = build.build(source, compiler=compiler)
    assert build.build(source, compiler=compiler) == first
    assert log.read_text().count("compiled") == 1
    assert ctypes.CDLL(str(first)).answer() == 41
    source.write_text(SOURCE.replace("ANSWER", "42"))
    second = build.build(source, compiler=compiler)
    assert second != first
    assert ctypes.CDLL(str(second)).answer() == 42
    assert log.read_text().count("compiled") == 2


def test_processes_that_ask_together_compile_once(source, tmp_path):
    compiler, log = counting_compiler(tmp_path)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_build_and_call, args=(source, compiler, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [41] * 4
    for process in processes:
        process.join()
    assert log.read_text().count("compiled") == 1


def test_a_failed_build_leaves_nothing_that_looks_finished_and_can_be_repeated(source):
    good = source.read_text()
    source.write_text("int broken( {\n")
    with pytest.raises(BuildError, match=r"toy/toy\.cpp: .* failed: .*error"):
        build.build(source)
    left = [path.name for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*") if path.is_file()]
    assert left == ["lock"]
    source.write_text(good)
    assert ctypes.CDLL(str(build.build(source))).answer() == 41


def test_the_key_depends_on_compiler_flags_and_headers(source, monkeypatch, tmp_path):
    compiler = build.find_compiler()

    def key(*flags):
        return build._fingerprint(source, flags, compiler)

    before = key(*build.FLAGS)
    assert key(*build.FLAGS, "-O2") != before
    monkeypatch.setattr(build, "_version", lambda compiler: "another compiler 1.0")
    assert key(*build.FLAGS) != before
    monkeypatch.undo()
    (source.parent / "simd.h").write_text('#include "nested.h"\n')
    other = key(*build.FLAGS)
    assert other != before
    (source.parent / "nested.h").write_text("#pragma once\n")
    assert key(*build.FLAGS) != other


def test_every_instruction_set_of_this_processor_builds_and_the_plain_one_is_always_there(source):
    names = build.instruction_sets()
    assert names[-1] == "plain"
    libraries = {build.build(source, name) for name in names}
    assert len(libraries) == len(names)
    assert all(ctypes.CDLL(str(library)).answer() == 41 for library in libraries)


def test_instruction_sets_follow_the_processors_features(monkeypatch):
    sets = dict(build.INSTRUCTION_SETS)
    for name, has in (
        ("avx512", ("avx512", "avx2", "plain")),
        ("avx2", ("avx2", "plain")),
        ("plain", ("plain",)),
    ):
        features = frozenset().union(*(sets[known][1] for known in has))
        monkeypatch.setattr(build, "_cpu_features", lambda features=features: features)
        assert build.instruction_sets() == has, name


def test_no_flag_gives_up_nan_and_infinity():
    flags = [*build.FLAGS, *(flag for extra, _ in build.INSTRUCTION_SETS.values() for flag in extra)]
    assert not re.search(r"fast-math|finite-math|associative|reciprocal", " ".join(flags))


def test_a_named_compiler_that_is_not_there_is_an_error(source):
    with pytest.raises(BuildError, match="no-such-compiler not found on the PATH"):
        build.build(source, compiler="no-such-compiler")


def test_clang_is_refused_whatever_it_is_called(source, tmp_path):
    # Its OpenMP code needs a library that torch has not loaded.
    for name in ("c++", "clang++"):
        script = tmp_path / name
        script.write_text("#!/bin/sh\necho 'Debian clang version 14.0.6'\n")
        script.chmod(0o755)
        with pytest.raises(BuildError, match=r"is clang.*install g\+\+"):
            build.build(source, compiler=str(script))
    assert "clang++" not in build.COMPILERS


def test_kernels_share_torchs_openmp_library():
    # In a process of its own: other packages that tests import bring OpenMP libraries too.
    code = (
        "from spikescale.kernels.wkv.cpu import library; library('cpu-plain')\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split()[-1] for line in maps if 'libgomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_a_cache_folder_that_cannot_be_made_is_a_build_error(source, tmp_path, monkeypatch):
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    with pytest.raises(BuildError, match=r"toy/toy\.cpp: the library cannot be written .*occupied"):
        build.build(source)
