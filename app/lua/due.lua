-- What the ticker has to look at: expired leases and passed deadlines. Only lists; Python decides and appends.
-- KEYS[1] the partition's lease set, KEYS[2] its due set. ARGV: at most so many of each.
-- Answers {'leases' or 'due', member, score, attempt, max_attempts} tuples.
local now_ms = digits(math.floor(now_us() / 1000))
local answer = {}
for i, what in ipairs({ 'leases', 'due' }) do
  local found = redis.call('ZRANGEBYSCORE', KEYS[i], '-inf', now_ms, 'WITHSCORES', 'LIMIT', 0, ARGV[3])
  for j = 1, #found, 2 do
    local org, id = string.match(found[j], '^([^/]*)/(.*)$')
    local fields = load(org, id) or {}
    answer[#answer + 1] = {
      what, found[j], found[j + 1], fields.attempt or '0', fields.max_attempts or '1',
    }
  end
end
return answer
