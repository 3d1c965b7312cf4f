-- Who is let in: API key -> tenant, the models that may be asked, rates, and leases of streams. See README.md.
local ffi = require("ffi")

ffi.cdef([[
  unsigned char *SHA256(const unsigned char *data, size_t size, unsigned char *digest);
  extern volatile uintptr_t ngx_current_msec;
]])

local LEASE_SECONDS = 2 -- of a stream that sends nothing
local LONG_SECONDS = 60 -- that a request of the kinds "long" and "turn" may take: their nginx location's read time-out
local HEALTHY_SECONDS = 5 -- after a replica's last canary
local BYTES = 128 * 1024 -- for each of which a request counts once more: two chunks' audio
local COMPRESSED = "Compressed requests are not taken."

-- The file `models` beside this one.
local MODELS = {}
for line in io.lines(debug.getinfo(1, "S").source:match("^@(.*/)") .. "models") do
  local name, kind, bytes = line:match("^([a-z0-9_]+) +(%a+) +(%d+)")
  if name then
    MODELS[name] = { kind = kind, bytes = tonumber(bytes) }
  end
end

local GRPC_STATUS = { -- of an HTTP status
  [400] = 3, [401] = 16, [403] = 7, [404] = 7, [405] = 7, [408] = 4, [413] = 3, [415] = 12, [429] = 8, [503] = 14,
}
local SENTENCES = { -- for what nginx itself refuses
  [400] = "This is no request that the edge understands.",
  [403] = "This is not served here.",
  [408] = "The request came too slowly.",
  [413] = "The request is larger than the edge takes.",
  [429] = "Too many requests of this tenant are under way.",
  [503] = "No replica answers.",
}

local edge = {}
local leases, rates, answers = ngx.shared.leases, ngx.shared.rates, ngx.shared.answers
local tenants -- by the hash of a key
local machine_streams
local tenants_text
local canaries, canaries_age = nil, HEALTHY_SECONDS

local function is_grpc()
  return (ngx.var.content_type or ""):find("^application/grpc") ~= nil
end

-- Answers the request with an error and ends it.
local function refuse(status, sentence, retry_after)
  ngx.header["Retry-After"] = retry_after
  ngx.ctx.refused = status
  if not is_grpc() then
    ngx.status = status
    ngx.header.content_type = "application/json"
    if status == 401 then
      ngx.header["WWW-Authenticate"] = "Bearer"
    end
    ngx.say('{"error":"', sentence, '"}') -- as Triton does; our sentences need no escaping
    return ngx.exit(ngx.HTTP_OK)
  end
  ngx.status = ngx.HTTP_OK
  ngx.header.content_type = "application/grpc"
  ngx.header["grpc-status"] = GRPC_STATUS[status] or 13
  ngx.header["grpc-message"] = sentence
  ngx.header.content_length = 0 -- so that the headers end the stream: gRPC's "trailers only"
  ngx.send_headers()
  return ngx.exit(ngx.HTTP_OK)
end

local function file(name)
  local handle = io.open(ngx.config.prefix() .. name)
  if not handle then
    return nil
  end
  local text = handle:read("*a")
  handle:close()
  return text
end

-- The file `tenants`: "streams N", then a line a key: SHA-256, tenant, streams, requests a second.
local function read_tenants()
  local text = file("tenants")
  if not text or text == tenants_text then
    return
  end
  tenants_text = text
  local found, streams = {}, tonumber(text:match("^streams (%d+)\n"))
  for line in text:gmatch("\n([^\n]+)") do
    local hash, name, own_streams, rate = line:match("^(%x+) ([a-z0-9_-]+) (%d+) ([%d.e+-]+)$")
    if not hash or #hash ~= 64 or not tonumber(rate) then
      streams = nil
      break
    end
    found[hash] = { name = name, streams = tonumber(own_streams), rate = tonumber(rate) }
  end
  if streams then
    tenants, machine_streams = found, streams
  else
    ngx.log(ngx.ERR, "the file of tenants is broken: they stay as they were")
  end
end

-- The file `canaries` is written anew whenever a replica has answered one, and empty while none is up.
local function read_canaries()
  local text = file("canaries") or ""
  if text == "" then
    canaries_age = HEALTHY_SECONDS
  elseif text ~= canaries then
    canaries_age = 0
  else
    canaries_age = canaries_age + 1
  end
  canaries = text
end

-- Leases run by the wall clock. When that is set, all are given back: each stream that lives takes one anew with its
-- next request, and none is held for as long as the clock was set back.
local clock_offset
local function watch_clock()
  local offset = ngx.now() - tonumber(ffi.C.ngx_current_msec) / 1000
  if clock_offset and math.abs(offset - clock_offset) > 0.5 then
    leases:flush_all()
    rates:flush_all()
  end
  clock_offset = offset
end

function edge.begin()
  local function look()
    read_tenants()
    read_canaries()
    watch_clock()
  end
  look()
  assert(ngx.timer.every(1, look))
end

local digest = ffi.new("unsigned char[32]")
local function hash_of(key)
  ffi.C.SHA256(key, #key, digest)
  return (ffi.string(digest, 32):gsub(".", function(byte)
    return ("%02x"):format(byte:byte())
  end))
end

-- Counts requests of a tenant: in this second, or for a rate below 1 in the time that one takes. True if it has sent more
-- than it may, and the window's length.
local function count(tenant, requests)
  local window = math.max(1, 1 / tenant.rate)
  local counted = rates:incr(tenant.name .. math.floor(ngx.now() / window), requests, 0, 2 * window)
  return counted and counted > tenant.rate * window, window
end

-- Whose key it is. What is looked up is a hash, of which nobody can choose a single bit: how long that takes tells nothing.
function edge.authenticate(method)
  local key = (ngx.var.http_authorization or ""):match("^[Bb]earer +(%S+)$")
  local tenant = key and tenants and tenants[hash_of(key)]
  if not tenant then
    return refuse(401, "An API key is needed: authorization: Bearer KEY.")
  end
  ngx.var.tenant = tenant.name
  ngx.ctx.tenant = tenant
  if method and ngx.req.get_method() ~= method then
    return refuse(403, SENTENCES[403])
  end
  local exceeded, window = count(tenant, 1)
  if exceeded then
    return refuse(429, "The tenant sends more requests than it may.", math.ceil(window))
  end
end

function edge.forbid()
  return refuse(403, SENTENCES[403])
end

-- Takes the first free place; it comes free when its lease ends. `add` is atomic: no two get the same.
local function take(prefix, places, seconds)
  for number = 1, places do
    local place = prefix .. number
    if leases:safe_add(place, true, seconds) then
      return place
    end
  end
end

-- Whether the lease still ran; its value is the places that it is on.
local function renew(lease, seconds)
  local places = leases:get(lease)
  for place in (places or ""):gmatch("%S+") do
    if not leases:expire(place, seconds) then -- it ended just before its lease
      leases:delete(lease)
      return false
    end
  end
  return places and leases:expire(lease, seconds)
end

-- Lets a stream in that has a lease, or for which there is one.
local function admit(name)
  local tenant = ngx.ctx.tenant
  local lease = tenant.name .. "/" .. name
  -- of several requests that begin one stream, for several workers, the first one takes the places
  if not renew(lease, LEASE_SECONDS) and leases:add(lease, "", LEASE_SECONDS) then
    local own = take(tenant.name .. "#", tenant.streams, LEASE_SECONDS)
    if not own then
      leases:delete(lease)
      return refuse(429, "The tenant has as many streams as it may have at a time.", LEASE_SECONDS)
    end
    local shared = take("#", machine_streams, LEASE_SECONDS)
    if not shared then
      leases:delete(own)
      leases:delete(lease)
      return refuse(429, "The machine has as many streams as it can carry.", LEASE_SECONDS)
    end
    leases:set(lease, own .. " " .. shared, LEASE_SECONDS)
  end
  ngx.var.lease = lease
end

-- A stream with an id is let in, or not, before its audio is read.
local function admit_by_header()
  local stream = ngx.var.http_x_talksplat_stream
  if not stream then
    return
  end
  if #stream > 64 or stream:find("[^A-Za-z0-9_-]") or stream == "" then
    return refuse(400, "x-talksplat-stream is 1 to 64 of A-Z, a-z, 0-9, '-' and '_'.")
  end
  ngx.var.stream = stream
  admit(stream)
end

-- Passes a request on that is known to be for a model; without an id its connection stands for the stream.
local function pass(protocol, model)
  if ngx.var.lease == "" and model ~= MODELS.rasterizer then -- whose operations belong to no stream
    admit("connection " .. ngx.var.connection)
  end
  if model.kind == "chunk" then
    return ngx.exec(protocol .. "chunk")
  end
  if model.kind == "turn" then -- a tenant has one for each of its streams, and one more while another is given up
    local tenant = ngx.ctx.tenant
    local place = take(("%s/%s#"):format(tenant.name, ngx.var.model), tenant.streams + 1, LONG_SECONDS)
    if not place then
      return refuse(429, "The tenant has as many requests to this model under way as it may have.", 1)
    end
    ngx.var.place = place
  end
  renew(ngx.var.lease, LONG_SECONDS)
  return ngx.exec(protocol .. "long")
end

-- A request is answered. Was it a long one, its stream has as long as any other from now on.
function edge.done()
  if (ngx.var.place or "") ~= "" then
    leases:delete(ngx.var.place)
  end
  answers:incr(ngx.var.tenant .. " " .. (ngx.ctx.refused or ngx.status), 1, 0)
  local lease = ngx.var.lease
  if lease and lease ~= "" then
    renew(lease, LEASE_SECONDS)
  end
end

local function body_of(limit)
  ngx.req.read_body()
  local body = ngx.req.get_body_data() or ""
  if #body >= BYTES then -- this one has come; what it has cost counts for the next ones, before they are read
    count(ngx.ctx.tenant, math.floor(#body / BYTES))
  end
  if #body > limit then
    return nil, refuse(413, "The request is larger than this model takes.")
  end
  return body
end

local function varint(text, at)
  local value, scale = 0, 1
  for _ = 1, 10 do
    local byte = text:byte(at)
    if not byte then
      return nil
    end
    at = at + 1
    value = value + byte % 128 * scale
    if byte < 128 then
      return value, at
    end
    scale = scale * 128
  end
end

-- The strings among a Protobuf message's fields, by number; of one that comes twice the last, as Protobuf has it.
local function strings_of(message, at)
  local found = {}
  while at <= #message do
    local tag, size
    tag, at = varint(message, at)
    if not tag then
      return nil
    end
    local kind = tag % 8
    if kind == 0 then
      size, at = varint(message, at)
    elseif kind == 1 then
      at = at + 8
    elseif kind == 5 then
      at = at + 4
    elseif kind == 2 then
      size, at = varint(message, at)
      if not size or at + size - 1 > #message then
        return nil
      end
      local field = (tag - kind) / 8
      if field <= 3 then
        found[field] = message:sub(at, at + size - 1)
      end
      at = at + size
    else
      return nil
    end
    if not at then
      return nil
    end
  end
  return at == #message + 1 and found or nil
end

-- The one message of a unary call: a byte that says whether it is compressed, its size in four, itself.
local function grpc_message()
  local body = body_of(2 * 1024 * 1024)
  if body:byte(1) == 1 then
    return refuse(415, COMPRESSED)
  end
  local a, b, c, d = body:byte(2, 5)
  local is_whole = d and body:byte(1) == 0 and ((a * 256 + b) * 256 + c) * 256 + d == #body - 5
  local strings = is_whole and strings_of(body, 6)
  if not strings then
    return refuse(400, "This is no request of one message.")
  end
  return strings, #body
end

local function known_model(name)
  local model = name and MODELS[name]
  if not model then
    return refuse(403, SENTENCES[403])
  end
  ngx.var.model = name
  return model
end

function edge.infer_by_grpc()
  admit_by_header()
  local strings, size = grpc_message()
  local model = known_model(strings[1]) -- model_name
  if size > model.bytes then
    return refuse(413, "The request is larger than this model takes.")
  end
  local id = strings[3]
  if id and #id <= 128 and not id:find("[^A-Za-z0-9._:-]") then
    ngx.var.id = id
  end
  return pass("@grpc_", model)
end

function edge.infer_by_http()
  local model = known_model(ngx.var.named)
  if ngx.var.http_content_encoding then
    return refuse(415, COMPRESSED) -- a small one may unpack to anything
  end
  admit_by_header()
  body_of(model.bytes)
  return pass("@http_", model)
end

function edge.describe_by_grpc()
  known_model(grpc_message()[1])
end

function edge.describe_by_http()
  known_model(ngx.var.named)
end

function edge.health()
  if canaries_age < HEALTHY_SECONDS then
    return ngx.say("ok")
  end
  return refuse(503, SENTENCES[503], 1)
end

-- What Prometheus asks for: answers by tenant and status (of gRPC the one that HTTP would have had), and streams.
function edge.metrics()
  local lines = {
    "# HELP talksplat_edge_requests_total Requests that the edge has answered or passed on.",
    "# TYPE talksplat_edge_requests_total counter",
  }
  for _, key in ipairs(answers:get_keys(0)) do
    local tenant, status = key:match("^(%S*) (%d+)$")
    local count = answers:get(key)
    table.insert(lines, ('talksplat_edge_requests_total{tenant="%s",status="%s"} %d'):format(tenant, status, count))
  end
  local streams = {}
  for _, tenant in pairs(tenants or {}) do
    streams[tenant.name] = 0
  end
  for _, key in ipairs(leases:get_keys(0)) do
    local tenant = key:match("^([a-z0-9_-]+)#%d+$")
    if tenant then
      streams[tenant] = (streams[tenant] or 0) + 1
    end
  end
  table.insert(lines, "# HELP talksplat_edge_streams Streams that hold a place.")
  table.insert(lines, "# TYPE talksplat_edge_streams gauge")
  for tenant, count in pairs(streams) do
    table.insert(lines, ('talksplat_edge_streams{tenant="%s"} %d'):format(tenant, count))
  end
  ngx.header.content_type = "text/plain; version=0.0.4"
  ngx.say(table.concat(lines, "\n"))
end

-- For errors of nginx's own, its upstreams among them.
function edge.failed()
  local status = ngx.status
  if status == 502 or status == 504 then
    status = 503
  end
  local sentence = SENTENCES[status] or ("The request was refused with status %d."):format(status)
  if ngx.var.scheme == "http" then
    sentence = "This port speaks TLS only."
  end
  local retry_after = (status == 503 or status == 429) and 1 or nil
  return refuse(status, sentence, retry_after)
end

return edge
