// Runs a package of AOTInductor without Python:
//   run_package SCHEMAS KERNELS PACKAGE INPUTS OUTPUTS
// SCHEMAS and KERNELS are natten2's libraries, natten2_schemas.so and _C.so; INPUTS is a list of tensors that
// torch.save wrote, OUTPUTS a tuple of them that torch.load reads.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <vector>

namespace {

void load_library(const char* path) {
  if (dlopen(path, RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
}

std::vector<at::Tensor> read_tensors(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("can't read ") + path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
  return tensors;
}

void write_tensors(const char* path, const std::vector<at::Tensor>& tensors) {
  // A list of tensors would be of a type that torch.load takes for unsafe.
  const std::vector<c10::IValue> values(tensors.begin(), tensors.end());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error(std::string("can't write ") + path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "usage: run_package SCHEMAS KERNELS PACKAGE INPUTS OUTPUTS\n";
    return 2;
  }
  try {
    load_library(argv[1]);
    load_library(argv[2]);
    torch::inductor::AOTIModelPackageLoader package(argv[3]);
    write_tensors(argv[5], package.run(read_tensors(argv[4])));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
