-- wrk's script: POST /identify with each photo in turn. wrk … -- PHOTO…
local requests, turn = {}, 0

function init(args)
  local boundary = "vultus-bench-7d1f"
  for _, path in ipairs(args) do
    local file = assert(io.open(path, "rb"))
    local photo = file:read("*a")
    file:close()
    local body = "--" .. boundary .. "\r\n"
      .. 'content-disposition: form-data; name="image"; filename="photo"\r\n\r\n'
      .. photo .. "\r\n--" .. boundary .. "--\r\n"
    local headers = { ["content-type"] = "multipart/form-data; boundary=" .. boundary }
    requests[#requests + 1] = wrk.format("POST", "/identify", headers, body)
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"answers": %d, "seconds": %.6f, "refused": %d, "errors": %d, "p50": %.6f, "p99": %.6f, "longest": %.6f}\n',
    summary.requests, summary.duration / 1e6, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6, latency.max / 1e6))
end
