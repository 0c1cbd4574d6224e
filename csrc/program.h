// Recorded programs (resnet_fast/runtime/recording.py) without Python: their steps are calls of operators.
#pragma once

#include <pybind11/pybind11.h>

namespace resnet_fast {

// Adds the classes Place and Program, and the function `kinds`, to the module.
void bind_program(pybind11::module_& m);

}  // namespace resnet_fast
