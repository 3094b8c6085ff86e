#include "cubin.h"

#include <elf.h>

#include <algorithm>
#include <cstring>

namespace {

// Attributes of .nv.info: a byte of format, a byte of attribute, then two bytes: a value, or the length of what
// follows.
constexpr uint8_t kSized = 4, kMaxThreads = 0x05, kFrameSize = 0x11, kParameter = 0x17, kRegisters = 0x2f;
constexpr uint8_t kGlobalSpace = 4;
constexpr uint16_t kElfMachineCuda = 190;
// From sm_90 on the section of a kernel that uses shared memory begins with what the system keeps of every block's.
constexpr uint32_t kReserved = 1024;

template <class T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

struct Image {
  const uint8_t* bytes;
  Elf64_Ehdr header;

  Elf64_Shdr section(unsigned i) const { return read<Elf64_Shdr>(bytes + header.e_shoff + i * header.e_shentsize); }
  std::string name(const Elf64_Shdr& s) const {
    return reinterpret_cast<const char*>(bytes + section(header.e_shstrndx).sh_offset + s.sh_name);
  }
};

// Calls visit(attribute, payload, length) for every attribute that has a payload.
template <class Visit>
void attributes(const Image& image, const Elf64_Shdr& section, Visit visit) {
  const uint8_t *at = image.bytes + section.sh_offset, *end = at + section.sh_size;
  while (at + 4 <= end) {
    const uint8_t format = at[0], attribute = at[1];
    const uint16_t length = format == kSized ? read<uint16_t>(at + 2) : 0;
    if (format == kSized && at + 4 + length <= end) visit(attribute, at + 4, length);
    at += 4 + length;
  }
}

void read_own(const Image& image, const Elf64_Shdr& section, Kernel& kernel) {
  attributes(image, section, [&](uint8_t attribute, const uint8_t* payload, uint16_t length) {
    if (attribute == kMaxThreads && length >= 12) {
      kernel.max_threads = read<uint32_t>(payload) * read<uint32_t>(payload + 4) * read<uint32_t>(payload + 8);
    }
    if (attribute != kParameter || length < 12) return;
    // index, ordinal and offset, then from bit 8 the space that is pointed to, from bit 18 the size.
    const uint16_t ordinal = read<uint16_t>(payload + 4), offset = read<uint16_t>(payload + 6);
    const uint32_t packed = read<uint32_t>(payload + 8);
    if (kernel.parameters.size() <= ordinal) kernel.parameters.resize(ordinal + 1);
    kernel.parameters[ordinal] = {offset, packed >> 18, ((packed >> 8) & 0xf) == kGlobalSpace};
  });
}

// The section of all kernels names them by the index of their symbol.
void read_common(const Image& image, const Elf64_Shdr& section, Cubin& found) {
  const Elf64_Shdr symbols = image.section(section.sh_link), names = image.section(symbols.sh_link);
  attributes(image, section, [&](uint8_t attribute, const uint8_t* payload, uint16_t length) {
    if ((attribute != kRegisters && attribute != kFrameSize) || length < 8) return;
    const auto* entry = image.bytes + symbols.sh_offset + read<uint32_t>(payload) * sizeof(Elf64_Sym);
    const auto* name = reinterpret_cast<const char*>(image.bytes + names.sh_offset + read<Elf64_Sym>(entry).st_name);
    const auto kernel = found.kernels.find(name);
    if (kernel == found.kernels.end()) return;
    (attribute == kRegisters ? kernel->second.registers : kernel->second.stack) = read<uint32_t>(payload + 4);
  });
}

bool starts(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

}  // namespace

bool read_cubin(const void* data, Cubin& found) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  if (std::memcmp(bytes, ELFMAG, SELFMAG) != 0) return false;
  const Image image{bytes, read<Elf64_Ehdr>(bytes)};
  if (image.header.e_machine != kElfMachineCuda || image.header.e_ident[EI_CLASS] != ELFCLASS64) return false;
  const uint32_t flags = image.header.e_flags;
  const bool recent = image.header.e_ident[EI_ABIVERSION] >= 8;
  found.capability = static_cast<int>(recent ? flags >> 8 & 0xff : flags & 0xff);
  found.specific = !recent && (flags & 0x800) != 0;
  for (unsigned i = 0; i < image.header.e_shnum; ++i) {
    const std::string name = image.name(image.section(i));
    if (starts(name, ".text.")) found.kernels[name.substr(6)];
  }
  for (unsigned i = 0; i < image.header.e_shnum; ++i) {
    const Elf64_Shdr section = image.section(i);
    const std::string name = image.name(section);
    if (name == ".nv.info") read_common(image, section, found);
    for (auto& [kernel, what] : found.kernels) {
      if (name == ".nv.info." + kernel) read_own(image, section, what);
      if (name == ".nv.shared." + kernel) {
        const auto bytes = static_cast<uint32_t>(section.sh_size);
        what.shared = bytes - std::min(bytes, found.capability >= 90 ? kReserved : 0);
      }
    }
  }
  return !found.kernels.empty();
}
