// What a compiled kernel says of itself: the sizes of its parameters, registers, stack and static shared memory.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct Parameter {
  uint32_t offset = 0, size = 0;
  bool pointer = false;  // declared as a pointer into global memory
};

struct Kernel {
  std::vector<Parameter> parameters;
  uint32_t registers = 0, stack = 0, shared = 0, max_threads = 1024;
};

struct Cubin {
  std::map<std::string, Kernel> kernels;
  int capability = 0;     // major * 10 + minor of what it was compiled for
  bool specific = false;  // for this capability alone (sm_90a)
};

// Reads an ELF image; false where it is none or holds what is not understood.
bool read_cubin(const void* image, Cubin& found);
