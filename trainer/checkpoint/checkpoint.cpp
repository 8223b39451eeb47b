#include "trainer/checkpoint/checkpoint.h"

namespace longspan::trainer {

std::string TensorEntry::Describe() const {
  std::string text = Str(ToString(dtype), "[");
  for (size_t i = 0; i < shape.size(); ++i) text += Str(i > 0 ? ", " : "", shape[i]);
  return text + "]";
}

TensorEntry NamedTensor::Entry() const {
  const Shape& shape = piece.has_value() ? piece->shape : tensor.shape();
  TensorEntry entry{name, tensor.dtype(), {}};
  for (int i = 0; i < shape.rank(); ++i) entry.shape.push_back(shape[i]);
  return entry;
}

std::vector<std::string> DifferingIdentity(const std::map<std::string, std::string>& saved,
                                           const std::map<std::string, std::string>& current) {
  std::map<std::string, std::string> sentences;
  for (const auto& [field, value] : saved) {
    const auto now = current.find(field);
    if (now == current.end()) {
      sentences[field] = Str(field, " is ", value, " in the checkpoint and is not set now");
    } else if (now->second != value) {
      sentences[field] = Str(field, " is ", value, " in the checkpoint and ", now->second, " now");
    }
  }
  for (const auto& [field, value] : current) {
    if (!saved.contains(field)) {
      sentences[field] = Str(field, " is not set in the checkpoint and is ", value, " now");
    }
  }
  std::vector<std::string> result;
  for (auto& [field, sentence] : sentences) result.push_back(std::move(sentence));
  return result;
}

}  // namespace longspan::trainer
