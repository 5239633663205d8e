package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"
)

type TaskStatusResponse struct {
	TaskID    string                 `json:"task_id"`
	Status    string                 `json:"status"`
	Response  map[string]interface{} `json:"response"`
	Error     string                 `json:"error"`
	Query     string                 `json:"query"`
	SessionID string                 `json:"session_id"`
	Mode      string                 `json:"mode"`
}

func getTaskStatus(taskID string) (*TaskStatusResponse, error) {
	url := fmt.Sprintf("http://localhost:8080/api/v1/tasks/%s", taskID)

	req, _ := http.NewRequest("GET", url, nil)
	req.Header.Set("X-API-Key", "sk_test_123456")

	client := &http.Client{}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()

	if resp.StatusCode == 404 {
		return nil, fmt.Errorf("task not found")
	}

	var status TaskStatusResponse
	json.NewDecoder(resp.Body).Decode(&status)

	return &status, nil
}

func waitForCompletion(taskID string, timeout time.Duration) (map[string]interface{}, error) {
	start := time.Now()

	for {
		status, err := getTaskStatus(taskID)
		if err != nil {
			return nil, err
		}

		switch status.Status {
		case "TASK_STATUS_COMPLETED":
			return status.Response, nil
		case "TASK_STATUS_FAILED":
			return nil, fmt.Errorf("task failed: %s", status.Error)
		case "TASK_STATUS_TIMEOUT":
			return nil, fmt.Errorf("task timed out")
		}

		if time.Since(start) > timeout {
			return nil, fmt.Errorf("polling timeout")
		}

		time.Sleep(2 * time.Second)
	}
}

func main() {
	result, err := waitForCompletion("task_abc123", 5*time.Minute)
	if err != nil {
		fmt.Println("Error:", err)
		return
	}

	fmt.Println("Result:", result)
}
