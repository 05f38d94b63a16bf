// A kernel in front of every c10d operator of torch's dispatcher, which writes a record into the ring of this process.
//
// Every path to a backend passes the dispatcher: Python calls, DDP's reducer, functional collectives, DTensor, compiled
// code. The kernel that was there before is called with the same stack. Nothing here needs the interpreter's lock: ends are
// stamped by the backend's own threads. Where things lie comes from ring_format.py, as macros.
#include <sys/mman.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/library.h>

namespace {

struct Record {
  uint64_t sequence, entered, enqueued, ended, bytes;
  uint32_t group, number, step, site;
  int32_t peer;
  uint8_t operation, dtype, phase, flags;
};
static_assert(sizeof(Record) == 64);

struct Group {
  c10::weak_intrusive_ptr<c10d::ProcessGroup> alive;  // its address cannot become another group's while this is held
  uint32_t index;
  uint32_t collectives = 0;
  std::unordered_map<int64_t, uint32_t> messages;  // by operation and peer
  uint32_t without_future = 0;                     // bit of an operation whose Work has none
};

struct Announced {
  uint32_t left = 0, site = 0;
  uint64_t moment = 0;
};

uint64_t* words = nullptr;
Record* records = nullptr;
char* names = nullptr;
std::atomic<bool> recording{false};
std::atomic<bool> ends{true};
std::atomic<uint64_t> life{0};  // of a ring: an end that belongs to the one before is not stamped
std::mutex writing;  // of sequences, groups, names, and of stamps into records that might be overwritten
// never destroyed: a backend's threads may still stamp ends while the process exits
auto& groups = *new std::unordered_map<c10d::ProcessGroup*, Group>;
uint32_t num_groups = 0;
uint64_t num_records = 0;
auto& libraries = *new std::vector<std::unique_ptr<torch::Library>>;
thread_local Announced announced;
thread_local uint64_t last_sequence = 0;
thread_local std::string error;

uint64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return uint64_t(time.tv_sec) * 1000000000u + uint64_t(time.tv_nsec);
}

template <typename T>
void store(T& place, T value) {
  __atomic_store_n(&place, value, __ATOMIC_RELEASE);
}

uint64_t word(int at) {
  return __atomic_load_n(&words[at], __ATOMIC_RELAXED);
}

bool append_locked(const char* line, uint64_t length) {
  uint64_t used = word(NAMES_USED_AT);
  if (used + length > NAMES_BYTES) {
    store(words[NAMES_LOST_AT], word(NAMES_LOST_AT) + 1);
    return false;
  }
  std::memcpy(names + used, line, length);
  store(words[NAMES_USED_AT], used + length);
  return true;
}

std::string in_quotes(const std::string& text) {
  std::string result = "\"";
  for (unsigned char letter : text) {
    if (letter == '"' || letter == '\\') result += '\\';
    if (letter >= 0x20) result += char(letter);
  }
  return result + '"';
}

// A group that Python has not told of yet: it has a name, its ranks are unknown.
Group& group_locked(const c10::intrusive_ptr<c10d::ProcessGroup>& group, bool is_told) {
  auto found = groups.find(group.get());
  if (found == groups.end()) {
    found = groups.emplace(group.get(), Group{c10::weak_intrusive_ptr<c10d::ProcessGroup>(group), ++num_groups}).first;
    if (!is_told) {
      std::string name;
      try {
        name = group->getGroupName();
      } catch (const std::exception&) {
      }
      std::string line = "{\"group\":" + std::to_string(found->second.index) + ",\"name\":" + in_quotes(name) +
          ",\"ranks\":[],\"axis\":\"\"}\n";
      append_locked(line.data(), line.size());
    }
  }
  return found->second;
}

uint8_t dtype_of(c10::ScalarType type) {
  switch (type) {
    case c10::ScalarType::Double: return DTYPE_FLOAT64;
    case c10::ScalarType::Float: return DTYPE_FLOAT32;
    case c10::ScalarType::Half: return DTYPE_FLOAT16;
    case c10::ScalarType::BFloat16: return DTYPE_BFLOAT16;
    case c10::ScalarType::Float8_e4m3fn: return DTYPE_FLOAT8_E4M3FN;
    case c10::ScalarType::Float8_e5m2: return DTYPE_FLOAT8_E5M2;
    case c10::ScalarType::Long: return DTYPE_INT64;
    case c10::ScalarType::Int: return DTYPE_INT32;
    case c10::ScalarType::Short: return DTYPE_INT16;
    case c10::ScalarType::Char: return DTYPE_INT8;
    case c10::ScalarType::Byte: return DTYPE_UINT8;
    case c10::ScalarType::Bool: return DTYPE_BOOL;
    case c10::ScalarType::ComplexFloat: return DTYPE_COMPLEX64;
    case c10::ScalarType::ComplexDouble: return DTYPE_COMPLEX128;
    default: return DTYPE_OTHER;
  }
}

struct Buffer {
  uint64_t bytes = 0;
  uint8_t dtype = DTYPE_NONE;
};

void add(Buffer& buffer, const c10::IValue& value) {
  if (value.isTensor()) {
    const at::Tensor& tensor = value.toTensor();
    if (!tensor.defined()) return;
    buffer.bytes += tensor.is_sparse() ? 0 : tensor.nbytes();
    buffer.dtype = dtype_of(tensor.scalar_type());
  } else if (value.isList()) {
    for (const c10::IValue& part : value.toListRef()) add(buffer, part);
  }
}

// What is where among the arguments of an operator.
struct Shape {
  uint8_t operation = OPERATION_UNKNOWN;
  int buffer = -1, group = -1, peer = -1, asynchronous = -1;
  bool is_message = false, returns_work = false, is_device = false;
};

void stamp_end(uint64_t sequence, uint8_t flags) {
  uint64_t time = now();
  std::lock_guard<std::mutex> lock(writing);
  Record& record = records[(sequence - 1) % NUM_SLOTS];
  if (record.sequence != sequence) return;  // it was overwritten long ago
  if (flags) store(record.flags, uint8_t(record.flags | flags));
  store(record.ended, time);
}

uint64_t begin(const Shape& shape, const torch::jit::Stack& stack, size_t base, Group** used) {
  uint64_t entered = now();
  Buffer buffer;
  if (shape.buffer >= 0) add(buffer, stack[base + shape.buffer]);
  auto group = stack[base + shape.group].toCustomClass<c10d::ProcessGroup>();
  int32_t peer = shape.peer >= 0 ? int32_t(stack[base + shape.peer].toInt()) : -1;
  bool blocks = shape.asynchronous >= 0 ? !stack[base + shape.asynchronous].toBool() : !shape.returns_work;
  uint32_t site = 0;
  uint64_t moment = word(MOMENT_AT);
  if (announced.left) {
    announced.left--;
    site = announced.site, moment = announced.moment;
  }
  std::lock_guard<std::mutex> lock(writing);
  Group& known = group_locked(group, false);
  *used = &known;  // entries of an unordered_map stay where they are
  uint64_t sequence = ++num_records;
  Record& record = records[(sequence - 1) % NUM_SLOTS];
  store(record.sequence, uint64_t(0));
  record.entered = entered;
  record.enqueued = record.ended = 0;
  record.bytes = buffer.bytes;
  record.group = known.index;
  record.number = shape.is_message ? known.messages[int64_t(shape.operation) << 32 | uint32_t(peer)]++ : known.collectives++;
  record.step = uint32_t(moment);
  record.site = site;
  record.peer = peer;
  record.operation = shape.operation;
  record.dtype = buffer.dtype;
  record.phase = uint8_t(moment >> 32);
  record.flags = blocks ? FLAG_BLOCKING : 0;
  store(record.sequence, sequence);
  last_sequence = sequence;
  return sequence;
}

// Have the end stamped by whoever completes the work. On a GPU its future is complete when the work is enqueued, which is
// no end; and not every backend has a future of every operation.
void watch(const Shape& shape, Group& group, const c10::IValue& result, uint64_t sequence) {
  uint32_t bit = 1u << (shape.operation & 31);
  if (shape.is_device || (__atomic_load_n(&group.without_future, __ATOMIC_RELAXED) & bit)) return;
  if (!result.isObject()) return;
  auto work = result.toCustomClass<c10d::Work>();
  if (!work) return;
  c10::intrusive_ptr<c10::ivalue::Future> future;
  try {
    future = work->getFuture();
  } catch (const std::exception&) {
  }
  if (!future) {
    __atomic_fetch_or(&group.without_future, bit, __ATOMIC_RELAXED);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(writing);
    Record& record = records[(sequence - 1) % NUM_SLOTS];
    if (record.sequence == sequence) store(record.flags, uint8_t(record.flags | FLAG_END_SEEN));
  }
  uint64_t of_ring = life.load();
  future->addCallback([sequence, of_ring](c10::ivalue::Future& done) {
    if (recording.load(std::memory_order_relaxed) && of_ring == life.load()) stamp_end(sequence, done.hasError() ? FLAG_FAILED : 0);
  });
}

class Kernel final : public c10::OperatorKernel {
 public:
  Kernel(c10::SafeKernelFunction before, Shape shape) : before_(std::move(before)), shape_(shape) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    if (!recording.load(std::memory_order_relaxed)) {
      before_.callBoxed(op, keys, stack);
      return;
    }
    Group* group = nullptr;
    uint64_t sequence = begin(shape_, *stack, stack->size() - op.schema().arguments().size(), &group);
    try {
      before_.callBoxed(op, keys, stack);
    } catch (...) {
      stamp_end(sequence, FLAG_END_SEEN | FLAG_FAILED);
      throw;
    }
    if (!shape_.returns_work) {  // it has waited inside
      stamp_end(sequence, FLAG_END_SEEN);
      return;
    }
    Record& record = records[(sequence - 1) % NUM_SLOTS];
    uint64_t time = now();
    {
      std::lock_guard<std::mutex> lock(writing);
      if (record.sequence == sequence) store(record.enqueued, time);
    }
    if (ends.load(std::memory_order_relaxed)) watch(shape_, *group, stack->back(), sequence);
  }

 private:
  c10::SafeKernelFunction before_;
  Shape shape_;
};

uint8_t operation_of(const std::string& name) {
  const std::pair<const char*, uint8_t> known[] = {
      {"allreduce", OPERATION_ALL_REDUCE},    {"all_reduce", OPERATION_ALL_REDUCE},
      {"allgather", OPERATION_ALL_GATHER},    {"all_gather", OPERATION_ALL_GATHER},
      {"reduce_scatter", OPERATION_REDUCE_SCATTER}, {"alltoall", OPERATION_ALL_TO_ALL},
      {"all_to_all", OPERATION_ALL_TO_ALL},   {"broadcast", OPERATION_BROADCAST},
      {"barrier", OPERATION_BARRIER},         {"recv_any_source", OPERATION_RECEIVE_ANY},
      {"recv", OPERATION_RECEIVE},            {"send", OPERATION_SEND},
      {"gather", OPERATION_GATHER},           {"scatter", OPERATION_SCATTER},
      {"reduce", OPERATION_REDUCE}};
  for (const auto& [part, operation] : known) {
    if (name.find(part) != std::string::npos) return operation;
  }
  return OPERATION_UNKNOWN;
}

Shape shape_of(const c10::FunctionSchema& schema, c10::DispatchKey key) {
  Shape shape;
  shape.operation = operation_of(schema.name().substr(schema.name().find("::") + 2));
  shape.is_message = shape.operation >= OPERATION_SEND;
  shape.is_device = key != c10::DispatchKey::CPU && key != c10::DispatchKey::SparseCPU;
  bool takes_output = shape.operation == OPERATION_SCATTER;  // what is scattered is there on the root alone
  const auto& arguments = schema.arguments();
  for (int at = 0; at < int(arguments.size()); at++) {
    const std::string& name = arguments[at].name();
    if (name == "process_group") shape.group = at;
    if (name == "async_op") shape.asynchronous = at;
    if (name == "root_rank" || name == "dst" || name == "src") shape.peer = at;
    bool is_tensor = name.find("tensor") == 0, is_input = name.find("input") == 0, is_output = name.find("output") == 0;
    bool is_split = name.find("split") != std::string::npos;
    if (!is_split && (is_tensor || (takes_output ? is_output : is_input)) && shape.buffer < 0) shape.buffer = at;
  }
  if (shape.operation == OPERATION_BARRIER) shape.buffer = -1;
  for (const auto& result : schema.returns()) {
    if (result.type()->str().find("Work") != std::string::npos) shape.returns_work = true;
  }
  return shape;
}

class Silent final : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}  // that a kernel is overridden is what is meant
};

int install() {
  auto& dispatcher = c10::Dispatcher::singleton();
  Silent silent;
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  int seen = 0;
  for (auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::XPU, c10::DispatchKey::PrivateUse1,
                   c10::DispatchKey::SparseCPU, c10::DispatchKey::SparseCUDA}) {
    auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "c10d", key, __FILE__, __LINE__);
    int here = 0;
    for (const auto& name : dispatcher.getAllOpNames()) {
      if (name.name.rfind("c10d::", 0) != 0) continue;
      auto op = dispatcher.findOp(name);
      if (!op || !op->hasSchema() || !op->hasKernelForDispatchKey(key)) continue;
      Shape shape = shape_of(op->schema(), key);
      if (shape.group < 0) continue;
      std::string short_name = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
      library->impl(
          short_name.c_str(),
          torch::CppFunction::makeFromBoxedFunctor(
              std::make_unique<Kernel>(op->getComputedKernelForDispatchKey(key), shape)));
      here++;
    }
    if (here) libraries.push_back(std::move(library));
    seen += here;
  }
  return seen;
}

int map_ring(const char* path) {
  int descriptor = open(path, O_RDWR | O_CLOEXEC);
  if (descriptor < 0) return -1;
  void* memory = mmap(nullptr, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  close(descriptor);
  if (memory == MAP_FAILED) return -1;
  // a ring that was mapped before stays mapped: a backend's thread may still stamp an end into it
  words = static_cast<uint64_t*>(memory);
  names = static_cast<char*>(memory) + HEADER_BYTES;
  records = reinterpret_cast<Record*>(static_cast<char*>(memory) + HEADER_BYTES + NAMES_BYTES);
  return words[0] == MAGIC && words[1] == VERSION ? 0 : -1;
}

}  // namespace

extern "C" {

// Record into the ring at path from now on. Returns the number of kernels that were put in front, or -1.
int evermesh_tap_install(const char* path) {
  std::lock_guard<std::mutex> lock(writing);
  try {
    if (map_ring(path) != 0) {
      error = "the ring cannot be mapped";
      return -1;
    }
    life++;
    groups.clear();
    num_groups = 0;
    num_records = 0;
    int seen = int(libraries.size()) ? 1 : install();
    recording.store(true);
    return seen;
  } catch (const std::exception& found) {
    error = found.what();
    return -1;
  }
}

const char* evermesh_tap_error() {
  return error.c_str();
}

// Take the kernels away; no collective is under way.
void evermesh_tap_restore() {
  recording.store(false);
  libraries.clear();
}

void evermesh_tap_record(int wanted) {
  recording.store(wanted != 0);
}

void evermesh_tap_stamp_ends(int wanted) {
  ends.store(wanted != 0);
}

// Index of the process group at this address, which the caller keeps alive.
uint32_t evermesh_tap_group(uint64_t address) {
  auto group = c10::intrusive_ptr<c10d::ProcessGroup>::reclaim_copy(reinterpret_cast<c10d::ProcessGroup*>(address));
  std::lock_guard<std::mutex> lock(writing);
  return group_locked(group, true).index;
}

int evermesh_tap_name(const char* line, uint64_t length) {
  std::lock_guard<std::mutex> lock(writing);
  return append_locked(line, length) ? 1 : 0;
}

// One more operation of this thread is issued at this site, by somebody who stands there.
void evermesh_tap_announce(uint32_t site, uint64_t moment) {
  announced.left++;
  announced.site = site;
  announced.moment = moment;
}

// The last record of this thread.
uint64_t evermesh_tap_last() {
  return last_sequence;
}

// A message was waited for from now on, or (over) no longer.
void evermesh_tap_waited(uint64_t sequence, int over, int failed) {
  if (over) {
    stamp_end(sequence, failed ? FLAG_FAILED : 0);
    return;
  }
  std::lock_guard<std::mutex> lock(writing);
  Record& record = records[(sequence - 1) % NUM_SLOTS];
  if (record.sequence == sequence) store(record.flags, uint8_t(record.flags | FLAG_END_SEEN | FLAG_BLOCKING));
}

}
