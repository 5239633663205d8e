-- What the ticker has to look at: expired leases and passed deadlines. Only lists; Python decides and appends.
-- KEYS[1] the partition's lease set, KEYS[2] its due set. ARGV: at most so many of each.
-- Answers {'leases' or 'due', member, score, status, attempt, max_attempts, refunds, expires_at} tuples; '' for what a
-- task does not have.
local now_ms = digits(math.floor(now_us() / 1000))
local answer = {}
for i, what in ipairs({ 'leases', 'due' }) do
  local found = redis.call('ZRANGEBYSCORE', KEYS[i], '-inf', now_ms, 'WITHSCORES', 'LIMIT', 0, ARGV[3])
  for j = 1, #found, 2 do
    local org, id = string.match(found[j], '^([^/]*)/(.*)$')
    local one = { what, found[j], found[j + 1] }
    local told = org and { more(org, id, 'status', 'attempt', 'max_attempts', 'refunds', 'expires_at') } or {}
    for k = 1, 5 do one[k + 3] = told[k] or '' end
    answer[#answer + 1] = one
  end
end
return answer
