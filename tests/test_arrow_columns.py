# SPDX-License-Identifier: Apache-2.0
"""Columns made of buffers against pyarrow's own conversions."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from dre_slcl.training.arrow_columns import binary_column, join_strings, number_column, read_numbers, value_column

COLUMNS = [
    (pa.string(), ["", "Tumor | grade 3.", "\u00e4\u65e5", None, "a" * 5000]),
    (pa.string(), [None, None]),
    (pa.string(), []),
    (pa.bool_(), [True, None, False, True, True, False, False, True, True, None]),
    (pa.int32(), [0, -(2**31), 2**31 - 1]),
    (pa.int64(), [None, 2**62, -1]),
    (pa.float64(), [0.1, None, float("inf"), -0.0]),
]


@pytest.mark.parametrize(("kind", "values"), COLUMNS)
def test_values_of_every_type_with_some_missing(kind, values):
    column = value_column(values, kind)
    column.validate(full=True)
    assert column.equals(pa.array(values, kind))
    assert column.null_count == values.count(None)


def test_values_that_do_not_fit_are_errors():
    with pytest.raises(OverflowError):
        value_column([2**31], pa.int32())
    with pytest.raises(ValueError, match="text"):
        value_column(["text"], pa.float64())


def test_byte_strings_are_not_copied():
    strings = join_strings([b"one", b"", b"three"])
    column = binary_column(strings, pa.binary())
    assert column.to_pylist() == [b"one", b"", b"three"] == [bytes(value) for value in strings.to_list()]
    assert column.buffers()[2].address == strings.content.ctypes.data
    assert strings.lengths.tolist() == [3, 0, 5]


def test_numbers_are_read_from_parts_and_slices():
    numbers = np.arange(20)
    whole = number_column(numbers, pa.int32())
    column = pa.chunked_array([whole[3:7], whole[:0], whole[11:]])
    np.testing.assert_array_equal(read_numbers(column), np.concatenate([numbers[3:7], numbers[11:]]))
    assert read_numbers(pa.chunked_array([], pa.int32())).tolist() == []


def test_a_build_loads_neither_pandas_nor_datasets(tmp_path):
    program = (
        "import sys\n"
        "import dre_slcl_cli\n"
        "sys.argv = ['dre-slcl', 'tiles', '--slides', sys.argv[1], '--out', sys.argv[2], '--mpp', '1', '--pixels',"
        " 'copy', '--tile-size', '64', '--num-workers', '0']\n"
        "status = dre_slcl_cli.main()\n"
        "print(status, sorted({'pandas', 'datasets', 'torch', 'transformers', 'h5py'} & set(sys.modules)))\n"
    )
    from .slide_cohort import write_slide

    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides" / "s.tif", 0)
    command = [sys.executable, "-c", program, str(tmp_path / "slides"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
