#pragma once

// A plan as one array of 64-bit words, for one copy to the device, and where its tables lie there.

#include <cstring>
#include <vector>

#include "plan.h"

namespace mtl::cuda {

class Words {
 public:
  template <class Table>
  std::size_t append(const std::vector<Table>& table) {
    static_assert(sizeof(Table) % sizeof(std::int64_t) == 0, "tables are made of words");
    const std::size_t at = words_.size();
    words_.resize(at + table.size() * (sizeof(Table) / sizeof(std::int64_t)));
    if (!table.empty()) std::memcpy(words_.data() + at, table.data(), table.size() * sizeof(Table));
    return at;
  }
  const std::vector<std::int64_t>& all() const { return words_; }

 private:
  std::vector<std::int64_t> words_;
};

template <class Table>
const Table* table_at(const std::int64_t* words, std::size_t at) {
  return reinterpret_cast<const Table*>(words + at);
}

}  // namespace mtl::cuda
