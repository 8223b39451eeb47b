#pragma once
#include <string>
#include <string_view>

namespace longspan::data {

// The string value of `field` in one line of JSON. The line must be one JSON object; the field is
// looked for at its top level only, and the last one counts if it is repeated.
// DataError with the bare reason ("has no field \"text\""): the caller knows file and line.
std::string ExtractJsonField(std::string_view line, const std::string& field);

}  // namespace longspan::data
