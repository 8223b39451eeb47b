#include "configs/load.h"

#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "configs/defaults.h"
#include "configs/fields.h"
#include "configs/overrides.h"
#include "configs/text.h"
#include "ops/core/error.h"

namespace longspan::configs {
namespace {

struct Report {
  Place place;
  std::string text;
};

[[noreturn]] void ThrowReports(const Places& places, std::vector<Report> reports) {
  std::stable_sort(reports.begin(), reports.end(), [](const Report& a, const Report& b) {
    return a.place.Order() < b.place.Order();
  });
  std::string message;
  for (const Report& report : reports) {
    if (!message.empty()) message += '\n';
    message += Str(places.Describe(report.place), ": ", report.text);
  }
  throw ConfigError(message);
}

void AddProblems(const Config& config, const Places& places, const std::vector<Problem>& problems,
                 std::vector<Report>& reports) {
  for (const Problem& problem : problems) {
    Report& report = reports.emplace_back();
    report.place = places.Find(IndexedPath(config, problem.field));
    report.text =
        problem.field.empty() ? problem.message : Str(problem.field, ": ", problem.message);
  }
}

}  // namespace

std::string LoadedConfig::resolved_text() const {
  std::string text;
  google::protobuf::TextFormat::PrintToString(config, &text);
  return text;
}

std::string LoadedConfig::Where(std::string_view field) const {
  return places.Describe(places.Find(IndexedPath(config, field)));
}

LoadedConfig Load(const std::string& path, const std::vector<std::string>& sets) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  // Reading a directory fails here; an empty file also sets failbit, and is then found wanting
  // below.
  text << file.rdbuf();
  if (!file.is_open() || file.bad() || errno != 0) {
    throw ConfigError(Str("cannot read the configuration ", path, ": ", std::strerror(errno),
                          " (give the path of a .textproto file)"));
  }
  return LoadText(text.str(), path, sets);
}

LoadedConfig LoadText(const std::string& text, const std::string& name,
                      const std::vector<std::string>& sets) {
  ParsedText parsed = ParseText(text, name);
  LoadedConfig loaded{std::move(parsed.config), Places(name)};
  for (const FieldPlace& place : parsed.places) {
    loaded.places.SetLine(place.indexed_path, place.line);
  }
  std::vector<Report> reports;
  for (const UnknownField& unknown : parsed.unknown) {
    Report& report = reports.emplace_back();
    report.place.line = unknown.line;
    report.text = Str(unknown.path, ": unknown field (", unknown.advice, ")");
  }
  for (const std::string& set : sets) {
    if (auto problem = ApplySet(set, loaded.config, loaded.places)) {
      Report& report = reports.emplace_back();
      report.place.argument = set;
      report.text = *problem;
    }
  }
  AddProblems(loaded.config, loaded.places, Validate(loaded.config), reports);
  if (!reports.empty()) ThrowReports(loaded.places, std::move(reports));
  FillDefaults(loaded.config);
  return loaded;
}

void ThrowProblems(const LoadedConfig& loaded, const std::vector<Problem>& problems) {
  std::vector<Report> reports;
  AddProblems(loaded.config, loaded.places, problems, reports);
  ThrowReports(loaded.places, std::move(reports));
}

}  // namespace longspan::configs
